// Every pair of rate and budget was rehearsed by optinfer/widgets/traffic.py; here one is chosen and drawn.
import { element, keepKeys, shape } from "./dom.js";

function seconds(value) {
  if (value === null || Number.isNaN(value)) return "–";
  return value >= 1 ? `${value.toFixed(1)} s` : `${(value * 1e3).toFixed(value >= 0.01 ? 0 : 2)} ms`;
}

// Rectangles of stacked columns: those that run below, those that wait on top.
function columns(run, width, height) {
  const highest = Math.max(1, ...run.running.map((n, i) => n + run.waiting[i]));
  const wide = width / run.running.length;
  return { highest, rectangles: run.running.flatMap((running, i) => {
    const tall = (n) => (n * height) / highest, waiting = run.waiting[i];
    return [["running", running, height - tall(running)], ["waiting", waiting, height - tall(running + waiting)]]
      .filter(([, count]) => count > 0)
      .map(([kind, count, y]) => ({ kind, count, x: i * wide, y, width: wide, height: tall(count) }));
  }) };
}

function render({ model, el }) {
  keepKeys(el);
  const rates = model.get("rates"), budgets = model.get("budgets"), promise = model.get("promise");

  function slider(label, trait, values, say) {
    const input = element("input", { type: "range", min: 0, max: values.length - 1, step: 1, "aria-label": label });
    const output = element("output", { class: "oi-mono" });
    input.oninput = () => { model.set(trait, Number(input.value)); model.save_changes(); };
    const show = () => {
      input.value = model.get(trait);
      output.textContent = say(values[model.get(trait)]);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    return { node: element("label", { class: "oi-row" }, label, input, output), show };
  }
  const controls = [
    slider("Requests come", "rate", rates, (rate) => `${Number(rate.toPrecision(3))} per second`),
    slider("A step computes", "budget", budgets, (budget) => `${budget} tokens at most`),
  ];
  const body = element("tbody");
  const heads = ["", "half", "90 %", "99 %", "promised"].map((text) => element("th", { scope: "col" }, text));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);
  const verdict = element("div", { class: "oi-row", "aria-live": "polite" });
  const picture = shape("svg", { viewBox: "0 0 640 150", role: "img" });
  const legend = element("div", { class: "oi-row oi-muted" },
    element("span", {}, element("span", { class: "sw running" }), "requests that run"),
    element("span", {}, element("span", { class: "sw waiting" }), "requests that wait"));
  el.append(element("div", { class: "oi oi-traffic" }, element("h4", {}, "How long do users wait?"),
    ...controls.map((control) => control.node),
    element("div", { class: "oi-wide", tabindex: "0", role: "region", "aria-label": "Waits of the users" }, table),
    verdict, legend, picture));

  function row(name, values, most) {
    const cells = values.map((value) => element("td", { class: value > most ? "oi-mono broken" : "oi-mono" },
      `${seconds(value)}${value > most ? " ✗" : ""}`));
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells, element("td", { class: "oi-mono" }, seconds(most)));
  }

  function draw() {
    controls.forEach((control) => control.show());
    const run = model.get("runs")[model.get("budget")][model.get("rate")];
    body.replaceChildren(row("to the first token", run.ttft, promise.ttft), row("per token after it", run.tpot, promise.tpot));
    verdict.textContent = `Promise kept for ${Math.round(100 * run.kept)} % of the requests: ` +
      `${Number(run.goodput.toPrecision(3))} good ones per second`;
    const { highest, rectangles } = columns(run, 640, 120);
    picture.setAttribute("aria-label", `Up to ${highest} requests at once, up to ${Math.max(...run.waiting)} of them waiting, over ${seconds(run.seconds)}`);
    picture.replaceChildren(
      ...rectangles.map(({ kind, count, x, y, width, height }) => shape("rect", { class: kind, "data-count": count, x, y: y + 14, width, height })),
      shape("text", { x: 2, y: 10 }, `${highest} requests`), shape("text", { x: 2, y: 148 }, "0 s"),
      shape("text", { x: 638, y: 148, "text-anchor": "end" }, seconds(run.seconds)));
  }
  ["rate", "budget"].forEach((trait) => model.on(`change:${trait}`, draw));
  draw();
  return () => ["rate", "budget"].forEach((trait) => model.off(`change:${trait}`, draw));
}

export default { render, columns, seconds };
