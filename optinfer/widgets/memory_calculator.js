// The same count as optinfer/memory.py; a test holds the two equal.
import { element, keepKeys } from "./dom.js";

function plan(shape, { weight_bits, kv_bits, context, requests, prefill_chunk = 2048 }) {
  const weights = (shape.linear * weight_bits) / 8 + shape.other * 2;
  const kept = (group) => (group.window === null ? context : Math.min(context, group.window));
  const bytes = (group) => (kept(group) * group.per_token * kv_bits) / 8 + group.state_bytes;
  const perRequest = shape.cache.reduce((sum, group) => sum + bytes(group), 0);
  const tokens = Math.min(prefill_chunk, context * requests);
  const activations =
    tokens * (2 * shape.hidden + 3 * shape.intermediate) * 2 + requests * shape.vocabulary * 4;
  return { weights, kv_cache: perRequest * requests, activations };
}

const WEIGHT_BITS = [
  [16, "16 bits (bf16)"], [8, "8 bits (int8)"], [4.5, "4.5 bits (NF4, blocks of 64)"],
  [4.127, "4.127 bits (NF4, double quantization)"], [3.25, "3.25 bits (int3, groups of 64)"],
];
// What layers keep, in words; the kinds of optinfer/kv_cache/layers.py.
const KEPT = {
  full: () => "keys and values of all tokens",
  sliding: (window) => `of the last ${window.toLocaleString("en-US")} tokens`,
  chunked: (window) => `of a chunk of ${window.toLocaleString("en-US")} tokens`,
  latent: () => "one latent per token for all heads",
  linear: () => "a state of fixed size",
  shared: () => "an earlier layer's",
};
const KV_BITS = [[16, "16 bits"], [8, "8 bits"], [4, "4 bits"]];

function gigabytes(bytes) {
  const gb = bytes / 1e9;
  return gb >= 100 ? gb.toFixed(0) : gb >= 1 ? gb.toFixed(1) : gb.toFixed(2);
}

function render({ model, el }) {
  keepKeys(el);
  const set = (name, value) => { model.set(name, value); model.save_changes(); };

  function choice(label, trait, options) {
    const select = element("select", { "aria-label": label });
    for (const [value, text] of options) select.append(element("option", { value }, text));
    select.onchange = () => set(trait, typeof options[0][0] === "number" ? Number(select.value) : select.value);
    return { node: element("label", {}, label, select), show: () => { select.value = String(model.get(trait)); } };
  }

  // Sliders run over powers of two: each step doubles.
  function slider(label, trait, lowest, highest, unit) {
    const input = element("input", { type: "range", min: Math.log2(lowest), max: Math.log2(highest), step: 1, "aria-label": label });
    const output = element("output");
    input.oninput = () => set(trait, 2 ** Number(input.value));
    const show = () => {
      const value = model.get(trait);
      input.value = Math.log2(value);
      output.textContent = `${value.toLocaleString("en-US")} ${unit}`;
      input.setAttribute("aria-valuetext", output.textContent);
    };
    return { node: element("label", {}, element("span", {}, `${label}: `, output), input), show };
  }

  const controls = [
    choice("Model", "model", model.get("models").map((m) => [m.name, m.name])),
    choice("Weights", "weight_bits", WEIGHT_BITS),
    choice("KV cache", "kv_bits", KV_BITS),
    slider("Context", "context", 128, 131072, "tokens"),
    slider("Requests at once", "requests", 1, 256, ""),
  ];
  const total = element("div", { class: "oi-total", "aria-live": "polite" });
  const legend = element("div", { class: "oi-legend" });
  const bars = element("div");
  const facts = element("div", { class: "oi-facts" });
  const root = element("div", { class: "oi oi-mem" },
    element("div", { class: "oi-controls" }, ...controls.map((c) => c.node)), total, legend, facts, bars);
  el.append(root);

  function draw() {
    controls.forEach((c) => c.show());
    const shape = model.get("models").find((m) => m.name === model.get("model"));
    const options = Object.fromEntries(["weight_bits", "kv_bits", "context", "requests"].map((k) => [k, model.get(k)]));
    const need = plan(shape, options);
    const parts = [["oi-weights", "weights", need.weights], ["oi-kv", "KV cache", need.kv_cache], ["oi-act", "activations", need.activations]];
    const sum = need.weights + need.kv_cache + need.activations;
    total.textContent = `${gigabytes(sum)} GB`;
    legend.replaceChildren(...parts.map(([cls, name, bytes]) =>
      element("span", {}, element("span", { class: `oi-swatch ${cls}` }), `${name} ${gigabytes(bytes)} GB`)));
    const share = shape.active < 0.9 * (shape.linear + shape.other)
      ? `${(shape.active / 1e9).toFixed(1)} of ${((shape.linear + shape.other) / 1e9).toFixed(0)} billion parameters work on a token. ` : "";
    facts.textContent = `${share}Layers keep: ` +
      shape.cache.map((group) => `${group.layers} × ${KEPT[group.kind](group.window)}`).join("; ");
    bars.replaceChildren(...Object.entries(model.get("gpus")).map(([gpu, gb]) => {
      const scale = Math.max(sum, gb * 1e9);
      const track = element("div", { class: "oi-track", "aria-hidden": "true" });
      for (const [cls, , bytes] of parts) {
        const piece = element("span", { class: cls });
        piece.style.width = `${(100 * bytes) / scale}%`;
        track.append(piece);
      }
      const edge = element("div", { class: "oi-edge" });
      edge.style.left = `calc(${(100 * gb * 1e9) / scale}% - 2px)`;
      track.append(edge);
      const count = Math.ceil(sum / (gb * 1e9));
      const verdict = count === 1 ? `✓ fits, ${Math.round((100 * sum) / (gb * 1e9))} % full` : `✗ needs ${count} of them`;
      return element("div", { class: "oi-gpu" }, element("span", {}, `${gpu}, ${gb} GB`), track, element("span", {}, verdict));
    }));
  }
  const traits = ["model", "weight_bits", "kv_bits", "context", "requests"];
  traits.forEach((t) => model.on(`change:${t}`, draw));
  draw();
  return () => traits.forEach((t) => model.off(`change:${t}`, draw));
}

export default { render, plan };
