// The same enumeration as optinfer/speculative/rejection.py: accept min(p, q), else draw from max(0, p - q).
import { element, keepKeys } from "./dom.js";

function law(target, draft) {
  const normalize = (w) => { const sum = w.reduce((a, b) => a + b, 0) || 1; return w.map((x) => x / sum); };
  const p = normalize(target), q = normalize(draft);
  const accepted = p.map((x, i) => Math.min(x, q[i]));
  const accept = accepted.reduce((a, b) => a + b, 0);
  const left = p.map((x, i) => Math.max(0, x - q[i]));
  const total = left.reduce((a, b) => a + b, 0);
  const redrawn = left.map((x) => (total > 0 ? ((1 - accept) * x) / total : 0));
  return { p, q, accepted, accept, redrawn };
}

function render({ model, el }) {
  keepKeys(el);
  const tokens = model.get("tokens");
  const verdict = element("div", { class: "oi-row", "aria-live": "polite" });
  const sliders = [], rows = [];
  const body = element("tbody");
  tokens.forEach((token, i) => {
    const make = (trait, name) => {
      const input = element("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": `${name} of ${token}` });
      input.oninput = () => {
        const values = [...model.get(trait)];
        values[i] = Number(input.value);
        if (values.every((v) => v === 0)) values[i] = 1;
        model.set(trait, values);
        model.save_changes();
      };
      sliders.push([input, trait, i]);
      return input;
    };
    const kept = element("div", { class: "kept" }), left = element("div", { class: "left" });
    const p = element("td", { class: "oi-mono" }), q = element("td", { class: "oi-mono" }), out = element("td", { class: "oi-mono" });
    rows.push({ kept, left, p, q, out });
    body.append(element("tr", {}, element("th", { scope: "row" }, token), p, element("td", {}, make("target", "p, target")),
      q, element("td", {}, make("draft", "q, draft")), element("td", {}, element("div", { class: "bar", "aria-hidden": "true" }, kept, left)), out));
  });
  const head = element("tr", {}, ...["token", "p", "target", "q", "draft", "emitted", ""].map((t) => element("th", { scope: "col" }, t)));
  const legend = element("div", { class: "oi-row oi-muted" },
    element("span", {}, element("span", { class: "sw kept" }), "accepted from the draft: min(p, q)"),
    element("span", {}, element("span", { class: "sw left" }), "redrawn after a rejection: what is left of p"));
  el.append(element("div", { class: "oi oi-rej" }, element("h4", {}, "Drag p and q"),
    element("div", { class: "oi-wide", tabindex: "0", role: "region", "aria-label": "p, q and what is emitted" },
      element("table", {}, element("thead", {}, head), body)), legend, verdict));

  function draw() {
    const { p, q, accepted, accept, redrawn } = law(model.get("target"), model.get("draft"));
    sliders.forEach(([input, trait, i]) => { input.value = model.get(trait)[i]; });
    let worst = 0;
    rows.forEach((row, i) => {
      row.p.textContent = p[i].toFixed(3);
      row.q.textContent = q[i].toFixed(3);
      row.kept.style.width = `${100 * accepted[i]}%`;
      row.left.style.width = `${100 * redrawn[i]}%`;
      row.out.textContent = `${accepted[i].toFixed(3)} + ${redrawn[i].toFixed(3)} = ${(accepted[i] + redrawn[i]).toFixed(3)}`;
      worst = Math.max(worst, Math.abs(accepted[i] + redrawn[i] - p[i]));
    });
    verdict.textContent = `Accepted ${(100 * accept).toFixed(1)} % of the time. Largest difference between the emitted law and p: ${worst ? worst.toExponential(0) : "none"}`;
  }
  ["target", "draft"].forEach((t) => model.on(`change:${t}`, draw));
  draw();
  return () => ["target", "draft"].forEach((t) => model.off(`change:${t}`, draw));
}

export default { render, law };
