import { element, keepKeys } from "./dom.js";

const binary = (n, width) => n.toString(2).padStart(width, "0");

function halfToEven(x) {
  const low = Math.floor(x), rest = x - low;
  if (rest !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

// The bits of a number in a floating-point format, and the number that they stand for.
function encodeFloat(value, format) {
  const { exponent: e, mantissa: m, max } = format;
  const bias = 2 ** (e - 1) - 1;
  const sign = value < 0 || Object.is(value, -0) ? 1 : 0;
  const magnitude = Math.min(Math.abs(value), max);
  let power = magnitude === 0 ? 1 - bias : Math.floor(Math.log2(magnitude));
  while (2 ** power > magnitude && power > 1 - bias) power--;
  while (2 ** (power + 1) <= magnitude) power++;
  power = Math.max(power, 1 - bias);
  let steps = halfToEven(magnitude / 2 ** (power - m));
  if (steps === 2 ** (m + 1)) { steps /= 2; power++; }
  const normal = steps >= 2 ** m;
  const fields = [["sign", String(sign)], ["exponent", binary(normal ? power + bias : 0, e)],
    ["mantissa", binary(normal ? steps - 2 ** m : steps, m)]];
  return { fields, value: (sign ? -1 : 1) * steps * 2 ** (power - m) };
}

function encodeInteger(value, format, absmax) {
  const scale = absmax / format.max || 1;
  const code = Math.max(-format.max, Math.min(format.max, halfToEven(value / scale)));
  const digits = binary(code < 0 ? code + 2 ** format.bits : code, format.bits);
  return { fields: [["sign", digits[0]], ["integer", digits.slice(1)]], value: code * scale, code, scale };
}

function encodeIndex(value, format, absmax) {
  const scale = absmax || 1;
  let best = 0;
  format.table.forEach((level, i) => {
    if (Math.abs(level - value / scale) < Math.abs(format.table[best] - value / scale)) best = i;
  });
  return { fields: [["index", binary(best, format.bits)]], value: format.table[best] * scale, code: best, scale };
}

// The scale of a block whose largest magnitude is absmax: a power of two (E8M0), or E4M3 under one number for the tensor.
function blockScale(format, absmax, whole) {
  if (absmax === 0) return 1;
  if (format.scale === "e8m0") {
    let power = Math.floor(Math.log2(absmax));
    while (2 ** power > absmax) power--;
    while (2 ** (power + 1) <= absmax) power++;
    return 2 ** (power + (absmax / 2 ** power >= 1.75 ? 1 : 0) - 2);
  }
  const tensor = (448 * format.max) / whole;
  return (encodeFloat((absmax / format.max) * tensor, { exponent: 4, mantissa: 3, max: 448 }).value || 0.125) / tensor;
}

function encodeSmall(value, format, absmax, whole) {
  const scale = blockScale(format, absmax, whole), magnitude = Math.abs(value) / scale;
  let best = 0;
  for (let i = 1; i < 8; i++) {
    const nearer = Math.abs(format.table[i] - magnitude) - Math.abs(format.table[best] - magnitude);
    if (nearer < 0 || (nearer === 0 && i % 2 === 0)) best = i;
  }
  const code = value < 0 ? best + 8 : best, digits = binary(code, 4);
  const fields = [["sign", digits[0]], ["exponent", digits.slice(1, 3)], ["mantissa", digits[3]]];
  return { fields, value: format.table[code] * scale, code, scale };
}

// The largest magnitude among those that share number i's scale.
function largestAround(list, i, format) {
  const start = format.block ? i - (i % format.block) : 0;
  return Math.max(...list.slice(start, format.block ? start + format.block : undefined).map(Math.abs));
}

function encode(value, format, absmax, whole = absmax) {
  if (format.kind === "block") return encodeSmall(value, format, absmax, whole);
  if (format.kind === "float") return encodeFloat(value, format);
  return format.kind === "integer" ? encodeInteger(value, format, absmax) : encodeIndex(value, format, absmax);
}

const short = (x) => (x === 0 ? "0" : Math.abs(x) < 1e-4 || Math.abs(x) >= 1e6 ? x.toExponential(3) : String(Number(x.toPrecision(6))));

function percent(x) {
  if (x === 0) return "exact";
  return x < 1e-5 ? `${(x * 100).toExponential(0)} %` : `${Number((x * 100).toPrecision(2))} %`;
}

function bits(fields) {
  const box = element("span", { class: "oi-nf-bits", role: "img", "aria-label": fields.map(([n, d]) => `${n} ${d}`).join(", ") });
  for (const [name, digits] of fields) {
    const field = element("span", { class: `oi-nf-field ${name}`, title: `${name} ${digits}` });
    for (const digit of digits) field.append(element("b", { class: digit === "1" ? "one" : "zero" }, digit));
    box.append(field);
  }
  return box;
}

// A bar over four decades: 0.01 % is empty, 100 % is full.
function errorCell(error, drawn = true) {
  if (!drawn) return element("td", { class: "oi-mono" }, percent(error));
  const filled = error > 0 ? Math.max(0, Math.min(1, (Math.log10(error) + 4) / 4)) : 0;
  const bar = element("span", { class: "oi-nf-bar", "aria-hidden": "true" }, element("i", { style: `width:${100 * filled}%` }));
  return element("td", { class: "oi-mono" }, bar, percent(error));
}

function render({ model, el }) {
  keepKeys(el);
  let typed = null; // a number that replaces the picked weight

  const number = element("input", { type: "number", step: "any", class: "oi-nf-typed oi-mono", "aria-label": "The number" });
  const picker = element("select", { "aria-label": "Block of weights" });
  model.get("blocks").forEach((b, i) => picker.append(element("option", { value: i }, b.name)));
  const reset = element("button", {}, "back to the weight");
  const outlier = element("button", {}, "make it an outlier: × 10");
  const cells = element("div", { class: "oi-nf-cells", role: "group", "aria-label": "The group; arrow keys move" });
  const caption = element("div", { class: "oi-muted", "aria-live": "polite" });
  const body = element("tbody");
  const legend = element("div", { class: "oi-nf-legend" });
  for (const [name, text] of [["sign", "sign"], ["exponent", "exponent: the power of two"], ["mantissa", "mantissa or integer: the steps"], ["index", "index into 16 values"]])
    legend.append(element("span", {}, element("span", { class: `oi-nf-field ${name}` }, element("b", {}, "1")), text));

  const root = element("div", { class: "oi" },
    element("h4", {}, "Number-format inspector"),
    element("div", { class: "oi-row" }, element("label", {}, "number ", number), outlier, reset, element("label", {}, "group of ", picker)),
    cells, caption, legend,
    element("div", { class: "oi-wide", tabindex: "0", role: "region", "aria-label": "The number in every format" }, element("table", { class: "oi-nf-table" },
      element("thead", {}, element("tr", {}, ...["format", "bits", "stored as", "its error", "its group's error (RMS)"].map((t) => element("th", { scope: "col" }, t)))),
      body)));
  el.append(root);

  const values = () => {
    const list = [...model.get("blocks")[model.get("block")].values];
    if (typed !== null) list[model.get("index")] = typed;
    return list;
  };

  function choose(index) {
    typed = null;
    model.set("index", index);
    model.save_changes();
    draw();
  }

  function draw() {
    const list = values(), index = model.get("index"), value = list[index];
    const absmax = Math.max(...list.map(Math.abs));
    const whole = Math.max(absmax, model.get("blocks")[model.get("block")].tensor_absmax || 0);
    const coded = (i, format) => encode(list[i], format, largestAround(list, i, format), whole);
    picker.value = model.get("block");
    if (document.activeElement !== number || typed === null) number.value = Number(value.toPrecision(9));
    reset.disabled = typed === null;
    const focused = cells.contains(document.activeElement);
    cells.replaceChildren(...list.map((v, i) => {
      const height = absmax ? (48 * Math.abs(v)) / absmax : 0;
      const bar = element("i", { class: v < 0 ? "negative" : "", style: v < 0 ? `top:50%;height:${height}%` : `bottom:50%;height:${height}%` });
      const cell = element("button", { "aria-pressed": String(i === index), "aria-label": `weight ${i}: ${short(v)}`, title: short(v), tabindex: i === index ? 0 : -1 }, bar);
      cell.onclick = () => choose(i);
      return cell;
    }));
    if (focused) cells.children[index].focus();
    caption.textContent = `Number ${index} of a group of ${list.length}: ${short(value)}${typed === null ? "" : " (typed)"}. The group's absmax is ${short(absmax)}; INT8, INT4, NF4 and FP4 are scaled by it, MXFP4 and NVFP4 by that of their 32 and 16.`;
    body.replaceChildren(...model.get("formats").map((format) => {
      const own = coded(index, format);
      const error = value === 0 ? 0 : Math.abs(own.value - value) / Math.abs(value);
      const norm = Math.sqrt(list.reduce((s, v) => s + v * v, 0));
      const wrong = Math.sqrt(list.reduce((s, v, i) => s + (coded(i, format).value - v) ** 2, 0));
      const stored = element("td", { class: "oi-mono" }, own.code === undefined ? short(own.value) : String(Number(own.value.toPrecision(4))));
      if (own.code !== undefined) {
        const level = format.kind === "integer" ? own.code : Number(format.table[own.code].toPrecision(4));
        stored.append(element("small", {}, `${level} × ${Number(own.scale.toPrecision(4))}`));
      }
      return element("tr", {}, element("th", { scope: "row" }, `${format.name}`), element("td", {}, bits(own.fields)),
        stored, errorCell(error), errorCell(norm ? wrong / norm : 0, false));
    }));
  }

  number.oninput = () => {
    const value = Number(number.value);
    if (number.value === "" || !Number.isFinite(value)) return;
    typed = value;
    draw();
  };
  outlier.onclick = () => { typed = values()[model.get("index")] * 10; number.blur(); draw(); number.value = Number(typed.toPrecision(9)); };
  reset.onclick = () => { typed = null; draw(); };
  picker.onchange = () => { typed = null; model.set("block", Number(picker.value)); model.set("index", 0); model.save_changes(); draw(); };
  cells.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 16, ArrowUp: -16 }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(values().length - 1, model.get("index") + move)));
  };
  model.on("change:index", draw);
  model.on("change:block", draw);
  draw();
}

export default { render, encode, largestAround };
