// The lines of a kernel with their counts, computed by optinfer/widgets/kernel_profile.py; here one measure is drawn.
import { element, keepKeys } from "./dom.js";

const shown = (count) => count.toLocaleString("en");

// Parts of a bar's full width: what the least possible would take, and what comes on top of it.
function parts([count, least], most) {
  const useful = least === null ? count : Math.min(count, least);
  return { useful: useful / most, excess: (count - useful) / most };
}

// What is said of a chosen line.
function story(line) {
  if (!line.instructions[0]) return `Line ${line.number} leaves no instruction of its own.`;
  const kinds = line.classes.slice(0, 4).map(([kind, count]) => `${shown(count)} ${kind}`).join(", ");
  const moved = ["sectors", "wavefronts"].filter((measure) => line[measure][0])
    .map((measure) => `${shown(line[measure][0])} ${measure}, at best ${shown(line[measure][1])}`);
  return [`Line ${line.number}: ${kinds}`, ...moved].join("; ") + ".";
}

function render({ model, el }) {
  keepKeys(el);
  const lines = model.get("lines"), measures = model.get("measures");
  const choice = element("select", { "aria-label": "What is counted" },
    ...Object.entries(measures).map(([value, words]) => element("option", { value }, words)));
  choice.onchange = () => { model.set("measure", choice.value); model.save_changes(); };
  const body = element("tbody"), said = element("div", { class: "oi-panel", "aria-live": "polite" });
  const legend = element("div", { class: "oi-row oi-muted" },
    element("span", {}, element("span", { class: "oi-swatch" }), "needed"),
    element("span", {}, element("span", { class: "oi-swatch oi-excess" }), "beyond the least possible"));
  const rows = lines.map((line) => {
    const button = element("button", { class: "oi-line oi-mono", "aria-label": `Line ${line.number}` }, String(line.number));
    button.onclick = () => { model.set("line", line.number); model.save_changes(); };
    const count = element("td", { class: "oi-count oi-mono" }), bar = element("div", { class: "oi-bar" });
    const row = element("tr", {}, element("td", {}, button), count, element("td", {}, bar),
      element("td", {}, element("span", { class: "oi-mono oi-code" }, line.code)));
    return { line, row, count, bar, button };
  });
  body.append(...rows.map(({ row }) => row));
  const heads = ["line", "count", "", "source"].map((text) => element("th", { scope: "col" }, text));
  el.append(element("div", { class: "oi oi-profile" }, element("h4", {}, model.get("title")),
    element("label", { class: "oi-row" }, "Count", choice), legend, said,
    element("div", { class: "oi-wide", tabindex: "0", role: "region", "aria-label": "Source with counts" },
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body))));

  function draw() {
    const measure = model.get("measure"), chosen = model.get("line");
    choice.value = measure;
    const most = Math.max(1, ...lines.map((line) => line[measure][0]));
    for (const { line, row, count, bar, button } of rows) {
      const { useful, excess } = parts(line[measure], most);
      count.textContent = line[measure][0] ? shown(line[measure][0]) : "";
      bar.replaceChildren(...[["oi-needed", useful], ["oi-excess", excess]].filter(([, share]) => share > 0)
        .map(([kind, share]) => element("i", { class: kind, style: `width:${100 * share}%` })));
      row.className = line.number === chosen ? "oi-chosen" : "";
      button.setAttribute("aria-pressed", String(line.number === chosen));
    }
    const line = lines.find(({ number }) => number === chosen);
    const total = lines.reduce((sum, one) => sum + one[measure][0], 0);
    said.textContent = line ? story(line) : `${shown(total)} ${measures[measure]}. Choose a line's number to see what it does.`;
  }
  ["measure", "line"].forEach((trait) => model.on(`change:${trait}`, draw));
  draw();
  return () => ["measure", "line"].forEach((trait) => model.off(`change:${trait}`, draw));
}

export default { render, parts, story };
