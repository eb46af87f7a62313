// GPTQ, one column per step: a matrix of weights coloured by how far each has moved, and the output's error below.
import { element, keepKeys, shape } from "./dom.js";

const digits = (x) => x.toLocaleString("en-US", { maximumSignificantDigits: 3 });

function render({ model, el }) {
  keepKeys(el);
  const frames = model.get("frames");
  const original = model.get("original");
  const rows = original.length, columns = original[0].length;
  const cell = Math.min(44, 620 / columns), W = 20 + columns * cell, high = 110, strip = 46;
  let at = 0; // columns rounded so far

  const svg = shape("svg", { viewBox: `0 0 ${W} ${rows * cell + high + 40 + strip}`, style: `display:block;width:100%;max-width:${W}px`, role: "img", "aria-label": "Weights by column: quantized, and the error moved to the columns not yet quantized" });
  const text = element("div", { class: "oi-muted", "aria-live": "polite" });
  const slider = element("input", { type: "range", min: 0, max: columns, value: 0, "aria-label": "columns rounded" });
  const back = element("button", { type: "button", "aria-label": "previous column" }, "◀");
  const next = element("button", { type: "button", class: "oi-primary", "aria-label": "round the next column" }, "Round the next column ▶");
  el.append(element("div", { class: "oi" },
    element("h4", {}, "GPTQ: the error moves to the columns not yet rounded"),
    svg, element("div", { class: "oi-row" }, back, slider, next), text));

  const most = Math.max(1e-9, ...frames.flatMap((f) => [f.error, f.nearest]));
  const largest = Math.max(1e-9, ...frames.flatMap((f, i) => f.moved.flatMap((row) => row.slice(i + 1).map(Math.abs))));

  function curve(name, color, upTo, dashes) {
    const top = rows * cell + 20 + strip;
    const points = [[0, 0], ...frames.slice(0, upTo).map((f, i) => [i + 1, f[name]])]
      .map(([x, y]) => `${10 + x * cell},${top + high * (1 - y / most)}`).join(" ");
    return shape("polyline", { points, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dashes });
  }

  function draw() {
    const frame = at ? frames[at - 1] : { weights: original, moved: null, error: 0, nearest: 0 };
    svg.replaceChildren();
    frame.weights.forEach((row, r) => row.forEach((value, c) => {
      const moved = frame.moved && c >= at ? frame.moved[r][c] : 0;
      const fill = c < at ? "var(--oi-panel)" : moved > 0 ? "var(--oi-blue)" : moved < 0 ? "var(--oi-orange)" : "transparent";
      const opacity = c < at ? 1 : Math.min(0.75, 0.75 * Math.abs(moved) / largest);
      svg.append(shape("rect", { x: 10 + c * cell, y: r * cell + 2, width: cell - 2, height: cell - 2, fill, "fill-opacity": opacity, stroke: "var(--oi-line)" }));
      svg.append(shape("text", { x: 10 + c * cell + cell / 2 - 1, y: r * cell + cell / 2 + 5, "text-anchor": "middle", "font-size": 11, fill: c < at ? "var(--oi-muted)" : "var(--oi-fg)" }, value.toFixed(2)));
    }));
    if (at) frame.shares.forEach((share, c) => {
      if (c < at) return;
      const y = rows * cell + 22, height = 20 * Math.min(1, Math.abs(share));
      svg.append(shape("rect", { x: 10 + c * cell, y: share > 0 ? y - height : y, width: cell - 2, height, fill: share > 0 ? "var(--oi-blue)" : "var(--oi-orange)", "fill-opacity": 0.6 }));
      svg.append(shape("text", { x: 10 + c * cell + cell / 2 - 1, y: y + 4, "text-anchor": "middle", "font-size": 10, fill: "var(--oi-fg)" }, share.toFixed(2)));
    });
    if (at) svg.append(shape("text", { x: 10, y: rows * cell + 26, "font-size": 10, fill: "var(--oi-muted)" }, at > 3 ? "the row that moves them" : ""));
    if (at) svg.append(shape("rect", { x: 9 + (at - 1) * cell, y: 1, width: cell, height: rows * cell, fill: "none", stroke: "var(--oi-red)", "stroke-width": 2 }));
    svg.append(curve("nearest", "var(--oi-gray)", at, "5 4"), curve("error", "var(--oi-blue)", at, "0"));
    svg.append(shape("text", { x: 10, y: rows * cell + high + 36 + strip, "font-size": 12, fill: "var(--oi-fg)" },
      "output error: GPTQ solid, blue; round to nearest dashed, gray"));
    text.textContent = at
      ? `Column ${at} of ${columns} rounded. Output error so far: GPTQ ${digits(frame.error)}, nearest ${digits(frame.nearest)}. ` +
        "Blue weights were moved up to make up for it, orange ones down: each row's error times the numbers below the matrix, which come from the Hessian."
      : "Nothing is rounded yet.";
    slider.value = at;
    back.disabled = at === 0;
    next.disabled = at === columns;
  }

  const go = (to) => { at = Math.max(0, Math.min(columns, to)); draw(); };
  back.addEventListener("click", () => go(at - 1));
  next.addEventListener("click", () => go(at + 1));
  slider.addEventListener("input", () => go(Number(slider.value)));
  draw();
}

export default { render };
