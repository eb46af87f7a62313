// The history was played by optinfer/widgets/layer_groups.py with the real manager; here its frames are drawn.
import { element, keepKeys } from "./dom.js";

// Of each sequence and group the pages it holds, in ascending order.
function held(frame, groups) {
  return Object.entries(frame.lengths).map(([sequence, length]) => ({
    sequence, length,
    pages: groups.map((_, group) => frame.owners.flatMap((owner, page) =>
      owner && owner[0] === sequence && owner[1] === group ? [page] : [])),
  }));
}

function render({ model, el }) {
  keepKeys(el);
  const groups = model.get("groups"), frames = model.get("frames");
  const title = (group, number) => `group ${number}: ${group.layers.length} ${group.kind}` +
    (group.window ? `, window ${group.window}` : "");
  const slider = element("input", { type: "range", min: 0, max: frames.length - 1, step: 1, "aria-label": "Step" });
  slider.oninput = () => { model.set("step", Number(slider.value)); model.save_changes(); };
  const text = element("output", { class: "oi-mono", "aria-live": "polite" });
  const count = element("div", { class: "oi-row" });
  const pages = element("div", { class: "pages", role: "img" });
  const body = element("tbody");
  const heads = ["", "tokens", ...groups.map(title)].map((name) => element("th", { scope: "col" }, name));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);
  el.append(element("div", { class: "oi oi-groups" }, element("h4", {}, "One pool, a block table for each group of layers"),
    element("label", { class: "oi-row" }, "Step", slider, text), count,
    element("div", { class: "oi-row oi-muted" }, "A page names its sequence and group. Solid: a group that keeps all tokens. Dashed: one that stops growing."), pages,
    element("div", { class: "oi-wide", tabindex: "0", role: "region", "aria-label": "Pages of each sequence and group" }, table)));

  function draw() {
    const frame = frames[model.get("step")];
    slider.value = model.get("step");
    text.textContent = frame.text;
    slider.setAttribute("aria-valuetext", frame.text);
    const taken = frame.owners.filter((owner) => owner).length;
    count.textContent = `${taken} of ${frame.owners.length} pages are taken; if every layer kept all tokens: ${frame.uniform}`;
    pages.setAttribute("aria-label", count.textContent);
    pages.replaceChildren(...frame.owners.map((owner) => {
      const kind = !owner ? "page" : groups[owner[1]].kind === "full" || groups[owner[1]].kind === "latent" ? "page all" : "page some";
      return element("div", { class: kind }, owner ? `${owner[0]} ${owner[1]}` : "·");
    }));
    body.replaceChildren(...held(frame, groups).map(({ sequence, length, pages: lists }) => element("tr", {},
      element("th", { scope: "row" }, sequence), element("td", { class: "oi-mono" }, String(length)),
      ...lists.map((list) => element("td", { class: "oi-mono" }, list.join(" "))))));
  }
  model.on("change:step", draw);
  draw();
  return () => model.off("change:step", draw);
}

export default { render, held };
