// Rows are requests, columns are engine steps. Letters double every colour.
import { element, keepKeys, shape } from "./dom.js";

const KINDS = {
  prefill: { color: "var(--oi-orange)", letter: "P", name: "prefill chunk" },
  decode: { color: "var(--oi-blue)", letter: "", name: "decode, one token" },
  accepted: { color: "var(--oi-green)", letter: "+", name: "decode with accepted drafts" },
  rejected: { color: "var(--oi-sky)", letter: "−", name: "decode, drafts rejected" },
  preempted: { color: "var(--oi-red)", letter: "×", name: "preempted" },
};
const CELL = 14;
const LABEL = 120;

function kindOf(cell) {
  if (cell.kind === "prefill") return "prefill";
  if (!cell.drafted) return "decode";
  return cell.accepted ? "accepted" : "rejected";
}

function draw(run, step) {
  const columns = run.frames.length;
  const picture = shape("svg", {
    width: LABEL + columns * CELL + 4, height: run.labels.length * CELL + 4, role: "img",
    "aria-label": `${run.name}: ${run.labels.length} requests over ${columns} steps, shown up to step ${step + 1}`,
  });
  run.labels.forEach((label, row) => picture.append(shape("text", {
    x: LABEL - 6, y: row * CELL + 11, "text-anchor": "end", "font-size": 10, fill: "var(--oi-muted)",
  }, label)));
  const put = (row, column, kind, title) => {
    const { color, letter } = KINDS[kind];
    const box = shape("rect", { x: LABEL + column * CELL, y: row * CELL + 1, width: CELL - 1, height: CELL - 2, rx: 2, fill: color });
    box.append(shape("title", {}, title));
    picture.append(box);
    if (letter) picture.append(shape("text", {
      x: LABEL + column * CELL + 6.5, y: row * CELL + 11, "text-anchor": "middle", "font-size": 9, fill: "#000", "pointer-events": "none",
    }, letter));
  };
  run.frames.slice(0, step + 1).forEach((frame, column) => {
    for (const cell of frame.cells) {
      const drafts = cell.drafted ? `, ${cell.accepted} of ${cell.drafted} drafts accepted` : "";
      put(cell.row, column, kindOf(cell), `step ${column + 1}, ${run.labels[cell.row]}: ${cell.kind}, tokens ${cell.start} to ${cell.start + cell.tokens - 1}${drafts}`);
    }
    for (const row of frame.preempted) put(row, column, "preempted", `step ${column + 1}, ${run.labels[row]}: preempted`);
  });
  if (step < columns) picture.append(shape("rect", {
    x: LABEL + step * CELL - 0.5, y: 0.5, width: CELL, height: run.labels.length * CELL + 1, fill: "none", stroke: "var(--oi-fg)", "stroke-width": 1,
  }));
  return picture;
}

function facts(run, step) {
  const frame = run.frames[Math.min(step, run.frames.length - 1)];
  const tokens = frame.cells.reduce((sum, cell) => sum + cell.tokens + cell.drafted, 0);
  const over = step >= run.frames.length ? " (finished)" : "";
  const count = tokens === 1 ? "1 token" : `${tokens} tokens`;
  return `${run.name}${over}: ${count} in ${frame.ms.toLocaleString("en-US", { maximumSignificantDigits: 3 })} ms · ${frame.running} running, ${frame.waiting} waiting · ${frame.used} of ${run.blocks} blocks`;
}

function render({ model, el }) {
  keepKeys(el);
  const runs = model.get("runs");
  const last = Math.max(...runs.map((run) => run.frames.length)) - 1;
  const root = element("div", { class: "oi" });
  root.append(element("h4", {}, "What the engine did"));

  const legend = element("div", { class: "oi-row oi-muted" });
  for (const { color, letter, name } of Object.values(KINDS)) {
    const swatch = element("span", { style: `display:inline-block;width:14px;height:14px;border-radius:2px;background:${color};color:#000;font-size:10px;line-height:14px;text-align:center;margin-right:4px;vertical-align:middle` }, letter);
    legend.append(element("span", {}, swatch, name));
  }
  root.append(legend);

  const slider = element("input", { type: "range", min: 0, max: last, value: 0, "aria-label": "step" });
  const button = (label, text, action) => {
    const node = element("button", { "aria-label": label }, text);
    node.addEventListener("click", action);
    return node;
  };
  const show = (step) => {
    model.set("step", Math.max(0, Math.min(last, step)));
    model.save_changes();
    paint();
  };
  let timer = null;
  const play = button("play", "▶ Play", () => {
    if (timer) { clearInterval(timer); timer = null; play.textContent = "▶ Play"; return; }
    if (model.get("step") === last) show(0);
    play.textContent = "❚❚ Pause";
    timer = setInterval(() => {
      show(model.get("step") + 1);
      if (model.get("step") === last) play.click();
    }, 120);
  });
  const counter = element("span", { class: "oi-mono", "aria-live": "polite" });
  slider.addEventListener("input", () => show(Number(slider.value)));
  root.append(element("div", { class: "oi-row" },
    button("previous step", "◀", () => show(model.get("step") - 1)), play,
    button("next step", "▶", () => show(model.get("step") + 1)), slider, counter));

  const panels = runs.map(() => {
    const line = element("div", { class: "oi-mono oi-muted" });
    const chart = element("div", { style: "overflow-x:auto", tabindex: "0", "aria-label": "timeline, scrolls sideways" });
    root.append(line, chart);
    return { line, chart };
  });

  function paint() {
    const step = model.get("step");
    slider.value = step;
    counter.textContent = `step ${step + 1} of ${last + 1}`;
    runs.forEach((run, i) => {
      panels[i].line.textContent = facts(run, step);
      panels[i].chart.replaceChildren(draw(run, step));
      const right = LABEL + (step + 2) * CELL - panels[i].chart.clientWidth;
      panels[i].chart.scrollLeft = Math.max(0, right);
    });
  }
  paint();
  const onStep = () => paint();
  model.on("change:step", onStep);
  el.append(root);
  requestAnimationFrame(paint); // only now the charts have a width to scroll in
  return () => { if (timer) clearInterval(timer); model.off("change:step", onStep); };
}

export default { render };
