// Plays a trace that Python computed: nothing here knows how softmax works, it only shows what happened.
import { element, keepKeys } from "./dom.js";

const number = (x, digits = 3) => (Number.isFinite(x) ? x.toFixed(digits).replace(/^-(0[.0]*)$/, "$1") : x > 0 ? "inf" : "-inf");

function render({ model, el }) {
  keepKeys(el);
  const scores = model.get("scores");
  const frames = model.get("frames");
  const exact = model.get("exact");
  const low = Math.min(...scores), high = Math.max(...scores);
  let timer = null;

  const button = (text, label, action) => {
    const node = element("button", { "aria-label": label }, text);
    node.addEventListener("click", action);
    return node;
  };
  const go = (step) => {
    model.set("step", Math.max(0, Math.min(frames.length, step)));
    model.save_changes();
    draw();
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ Play"; };
  const back = button("◀ Back", "previous tile", () => { stop(); go(model.get("step") - 1); });
  const next = button("Next ▶", "next tile", () => { stop(); go(model.get("step") + 1); });
  const play = button("▶ Play", "play or pause", () => {
    if (timer) return stop();
    if (model.get("step") >= frames.length) go(0);
    play.textContent = "❚❚ Pause";
    timer = setInterval(() => { go(model.get("step") + 1); if (model.get("step") >= frames.length) stop(); }, 1400);
  });
  const slider = element("input", { type: "range", min: 0, max: frames.length, "aria-label": "tiles taken in" });
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  const where = element("span", { class: "oi-muted" });

  const bars = scores.map((score, i) => {
    const bar = element("div", { class: "oi-bar", title: `score ${i}: ${number(score, 2)}` });
    bar.style.height = `${8 + (92 * (score - low)) / (high - low || 1)}%`;
    return bar;
  });
  const labels = scores.map((score) => element("span", {}, number(score, 1)));
  const say = element("div", { class: "oi-say", "aria-live": "polite" });
  const state = element("div", { class: "oi-state" });
  const vector = element("table", { class: "oi-vector oi-mono" });
  const root = element("div", { class: "oi oi-softmax", tabindex: "0", role: "group", "aria-label": "online softmax, tile by tile" },
    element("h4", {}, `One query, ${scores.length} scores, never more than ${model.get("block")} at a time`),
    element("div", { class: "oi-row" }, back, play, next, slider, where),
    element("div", { class: "oi-bars", "aria-hidden": "true" }, ...bars),
    element("div", { class: "oi-labels", "aria-hidden": "true" }, ...labels),
    say, state, vector);
  root.addEventListener("keydown", (event) => {
    if (event.target === slider) return;
    if (event.key === "ArrowRight") { event.preventDefault(); stop(); go(model.get("step") + 1); }
    if (event.key === "ArrowLeft") { event.preventDefault(); stop(); go(model.get("step") - 1); }
  });

  function draw() {
    const step = model.get("step");
    const now = step > 0 ? frames[step - 1] : null;
    slider.value = step;
    where.textContent = `tile ${step} of ${frames.length}`;
    back.disabled = step === 0;
    next.disabled = step === frames.length;
    bars.forEach((bar, i) => {
      bar.dataset.state = !now || i >= now.last ? "unseen" : i >= now.first ? "now" : "done";
    });
    const panel = (name, value, note) =>
      element("div", { class: "oi-panel" }, element("span", { class: "oi-muted" }, name), element("b", {}, value), element("span", { class: "oi-muted" }, note));
    if (!now) {
      say.textContent = "Nothing has been read. Three things will be kept, whatever the length of the row: a maximum, a sum, and one output vector.";
      state.replaceChildren(panel("max m", "-inf", "largest score so far"), panel("sum l", "0", "of exp(score - m)"), panel("earlier sums ×", "-", "exp(old m - new m)"));
      vector.replaceChildren();
      return;
    }
    const changed = now.rescale < 1 && step > 1;
    say.textContent = step === 1
      ? `First tile: its maximum is ${number(now.max, 2)}, so weights are exp(score - ${number(now.max, 2)}). The output so far is already a softmax, of what was seen.`
      : changed
        ? `A larger score turned up: ${number(now.max, 2)}. Everything summed before was measured against the old maximum, so it is multiplied by ${number(now.rescale)}, then the tile is added.`
        : `No score above ${number(now.max, 2)} here: the earlier sums stay as they are (× 1), the tile is added.`;
    if (step === frames.length) {
      const error = Math.max(...now.out.map((x, i) => Math.abs(x - exact[i])));
      say.textContent += ` Last tile: the difference from the softmax of the whole row is ${error === 0 ? "0" : error.toExponential(1)}.`;
    }
    state.replaceChildren(
      panel("max m", number(now.max, 2), "largest score so far"),
      panel("sum l", number(now.sum), "of exp(score - m)"),
      panel("earlier sums ×", step === 1 ? "-" : number(now.rescale), "exp(old m - new m)"));
    const row = (name, values) => element("tr", {}, element("th", { scope: "row" }, name), ...values.map((x) => element("td", {}, number(x))));
    vector.replaceChildren(row("accumulator", now.acc), row("accumulator / l", now.out), row("whole-row softmax", exact));
  }

  model.on("change:step", draw);
  el.append(root);
  draw();
  return () => { clearInterval(timer); model.off("change:step", draw); };
}

export default { render };
