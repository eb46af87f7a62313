import { element, keepKeys } from "./dom.js";

const visible = (text) => text.replaceAll("\n", "⏎");

function render({ model, el }) {
  keepKeys(el);
  const rounds = model.get("rounds");
  const token = (text, cls, mark) => element("span", { class: `tok ${cls}`, title: mark }, visible(text));
  const text = element("div", { class: "oi-panel text" }), draft = element("div", { class: "oi-panel" });
  const counts = element("div", { class: "oi-row oi-mono", "aria-live": "polite" });
  let timer = null;
  const go = (to) => { model.set("step", Math.max(0, Math.min(rounds.length, to))); model.save_changes(); };
  const button = (label, name, action) => { const b = element("button", { "aria-label": name }, label); b.onclick = action; return b; };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ Play"; };
  const play = button("▶ Play", "play or pause", () => {
    if (timer) { stop(); return; }
    if (model.get("step") >= rounds.length) go(0);
    play.textContent = "❚❚ Pause";
    timer = setInterval(() => { if (model.get("step") >= rounds.length) stop(); else go(model.get("step") + 1); }, 700);
  });
  const slider = element("input", { type: "range", min: 0, max: rounds.length, "aria-label": "pass" });
  slider.oninput = () => go(Number(slider.value));
  const controls = element("div", { class: "oi-row" }, button("◀ Back", "one pass back", () => go(model.get("step") - 1)), play,
    button("Next ▶", "one pass on", () => go(model.get("step") + 1)), slider);
  const legend = element("div", { class: "oi-row" }, token("✓ accepted", "yes", ""), token("✗ rejected", "no", ""),
    token("never judged", "unseen", ""), token("the target's own", "own", ""));
  const root = element("div", { class: "oi oi-spec", tabindex: 0, role: "group", "aria-label": "speculative decoding, pass by pass" },
    element("h4", {}, "One pass of the target at a time"), element("div", { class: "oi-muted" }, model.get("prompt")), controls, draft, text, counts, legend);
  root.onkeydown = (event) => {
    if (event.target === slider) return;
    if (event.key === "ArrowRight") go(model.get("step") + 1);
    else if (event.key === "ArrowLeft") go(model.get("step") - 1);
    else return;
    event.preventDefault();
  };
  el.append(root);

  function draw() {
    const step = model.get("step");
    slider.value = step;
    const past = rounds.slice(0, step);
    text.replaceChildren(...past.flatMap((r) => r.emitted.map((t, i) => token(t, i < r.accepted ? "yes" : "own", i < r.accepted ? "accepted" : "the target's own"))));
    const now = past.at(-1);
    if (!now) draft.replaceChildren("Press Next: the draft proposes, the target checks.");
    else if (!now.drafted.length) draft.replaceChildren("nothing drafted: an ordinary pass, one token ", token(now.emitted.at(-1), "own", ""));
    else draft.replaceChildren(`${now.drafter} drafted `, ...now.drafted.map((t, i) => i < now.accepted ? token(t, "yes", "accepted")
      : i === now.accepted ? token(t, "no", "rejected") : token(t, "unseen", "never judged")), " and the target adds ", token(now.emitted.at(-1), "own", ""));
    const tokens = past.reduce((n, r) => n + r.emitted.length, 0);
    counts.textContent = `pass ${step} of ${rounds.length} · ${tokens} tokens · ${step ? (tokens / step).toFixed(2) : "–"} tokens per pass`;
  }
  model.on("change:step", draw);
  draw();
  return () => { clearInterval(timer); model.off("change:step", draw); };
}

export default { render };
