// The panes of the KV cache memory manager, each drawn from one state of the pool. A `view` holds what is the reader's:
// { blockSize, word(token), palette, selected, select(id), resume(id, tokens) }. Every mark carries data-block or data-seqs.
import { element, shape } from "./dom.js";

const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a7d00", "#7a6fd0"];
const DARK_TEXT = new Set(["#e69f00", "#cc79a7", "#56b4e9"]);

// A color for each sequence, in the order in which they are first asked for.
export function makePalette() {
  const names = [];
  const colorOf = (id) => { if (!names.includes(id)) names.push(id); return COLORS[names.indexOf(id) % COLORS.length]; };
  const paint = (id) => `--c:${colorOf(id)};--t:${DARK_TEXT.has(colorOf(id)) ? "#10151a" : "#ffffff"}`;
  return { colorOf, paint };
}

// What just happened to each block.
export function beatOf(events) {
  const beat = new Map();
  for (const e of events) {
    if (e.type === "BlockCopied") { beat.set(e.source, "source"); beat.set(e.target, "copied"); }
    else if (e.type === "BlockForgotten" && e.evicted) beat.set(e.block, "evicted");
    else if (e.type === "BlockTaken") beat.set(e.block, beat.get(e.block) === "evicted" ? "evicted" : "taken");
    else if (e.type === "BlockHit") beat.set(e.block, "hit");
    else if (e.type === "BlockReleased" && e.ref_count === 0) beat.set(e.block, "released");
  }
  return beat;
}

function chips(id, tokens, table, { blockSize, word }) {
  return Array.from({ length: Math.ceil(tokens.length / blockSize) }, (_, i) =>
    element("span", { class: "oi-group", tabindex: table ? 0 : null, "data-block": table?.[i], "data-seqs": table ? id : null,
      "aria-label": table ? `${id}, block ${i} of the sequence, in page ${table[i]}` : null },
      ...tokens.slice(i * blockSize, (i + 1) * blockSize).map((t) => element("span", { class: "oi-chip" }, word(t)))));
}

export function sequenceRows(state, view) {
  const { paint } = view.palette;
  const live = [...state.tables].map(([id, table]) =>
    element("div", { class: `oi-seq${id === view.selected ? " oi-selected" : ""}`, style: paint(id) },
      element("button", { type: "button", class: "oi-name", "data-seq": id, "aria-pressed": String(id === view.selected), "aria-label": `Select sequence ${id}`, onclick: () => view.select(id) }, String(id)),
      element("div", { class: "oi-chips" }, ...chips(id, state.tokens.get(id), table, view))));
  const waiting = [...state.preempted].map(([id, tokens]) =>
    element("div", { class: "oi-seq oi-waiting", style: paint(id) },
      element("button", { type: "button", class: "oi-name", "aria-label": `Resume ${id}`, title: "Resume", onclick: () => view.resume(id, tokens) }, `${id} ↻`),
      element("div", { class: "oi-chips" }, ...chips(id, tokens, null, view), element("em", { class: "oi-muted" }, "preempted, waits"))));
  const rows = [...live, ...waiting];
  return rows.length ? rows : [element("p", { class: "oi-muted" }, "no sequences")];
}

export function tableRows(state, { palette }) {
  const rows = [...state.tables].map(([id, table]) => element("div", { class: "oi-seq", style: palette.paint(id) },
    element("span", { class: "oi-name", "data-seq": id }, String(id)),
    element("div", { class: "oi-chips" }, ...table.map((block, i) =>
      element("span", { class: "oi-entry", tabindex: 0, "data-block": block, "data-seqs": id, "aria-label": `entry ${i} of ${id}: page ${block}` },
        element("small", {}, `${i}→`), String(block))))));
  return rows.length ? rows : [element("p", { class: "oi-muted" }, "no tables")];
}

export function pages(state, beat, view) {
  const owners = state.refCounts.map(() => []);
  for (const [id, table] of state.tables) table.forEach((block) => owners[block].push(id));
  return owners.map((ids, block) => page(state, block, ids, beat.get(block), view));
}

function page(state, block, ids, beat, { blockSize, word, palette: { colorOf } }) {
  const free = state.refCounts[block] === 0, cached = state.hashes[block] !== null;
  const stripes = ids.length > 1
    ? `linear-gradient(135deg, ${ids.map((id, i) => `${colorOf(id)} ${(100 * i) / ids.length}% ${(100 * (i + 1)) / ids.length}%`).join(", ")})`
    : ids.length ? colorOf(ids[0]) : "transparent";
  const rank = state.freeQueue.indexOf(block) + 1, tokens = state.content[block];
  const slots = Array.from({ length: blockSize }, (_, i) => i < tokens.length
    ? element("span", { class: "oi-slot oi-full" }, word(tokens[i])) : element("span", { class: "oi-slot" }));
  const description = `page ${block}: ` + (free ? `free, number ${rank} to be reused` : `used by ${ids.join(", ")}`) + (cached ? ", cached" : "") + `, ${tokens.length} of ${blockSize} slots filled`;
  const said = { source: "shared", copied: "copy", evicted: "evicted", taken: "new", hit: "hit", released: cached ? "kept" : "freed" };
  return element("div", { class: `oi-page${free ? " oi-free" : ""}${free && cached ? " oi-cached" : ""}${beat ? ` oi-beat oi-${beat}` : ""}`,
    style: `--p:${stripes}`, tabindex: 0, "data-block": block, "data-seqs": ids.join("\n"), "aria-label": description, title: description },
    element("div", { class: "oi-head" }, element("b", {}, String(block)),
      free ? null : element("span", { class: "oi-ref", title: "reference count" }, `×${state.refCounts[block]}`),
      element("span", { class: "oi-owners" }, free ? "" : ids.join(" ")),
      free ? element("span", { class: "oi-rank", title: "place in the free queue" }, `q${rank}`) : null,
      cached ? element("span", { class: "oi-hash oi-mono", title: `content hash ${state.hashes[block]}` }, `#${state.hashes[block].slice(0, 3)}`) : null),
    element("div", { class: "oi-slots" }, ...slots),
    beat ? element("span", { class: "oi-tag" }, said[beat]) : null);
}

// From a page to its copy, over the pane that shows both.
export function arrow(pane, source, target) {
  const box = pane.getBoundingClientRect();
  const [a, b] = [source, target].map((block) => pane.children[block].getBoundingClientRect());
  const x = (r) => r.left - box.left + r.width / 2, y = (r) => r.top - box.top + r.height / 2;
  const bend = Math.max(18, Math.abs(x(b) - x(a)) / 6);
  const mx = (x(a) + x(b)) / 2, my = (y(a) + y(b)) / 2 - bend;
  const angle = Math.atan2(y(b) - my, x(b) - mx), tip = [x(b) - 10 * Math.cos(angle), y(b) - 10 * Math.sin(angle)];
  const wing = (d) => `L${tip[0] - 9 * Math.cos(angle + d)},${tip[1] - 9 * Math.sin(angle + d)}`;
  const d = `M${x(a)},${y(a)} Q${mx},${my} ${tip[0]},${tip[1]} ${wing(0.5)} M${tip[0]},${tip[1]} ${wing(-0.5)}`;
  return shape("svg", { class: "oi-arrow", "aria-hidden": "true" }, shape("path", { d }));
}

const KINDS = [["used", "hold tokens"], ["reserved", "reserved for later"], ["internal", "never used"], ["external", "free, but useless to those who wait"], ["free", "free"]];

// The same requests with contiguous reservations, and both ways' use of the memory.
export function twinLane(state, contiguous, { blockSize, palette: { paint } }) {
  const { total } = contiguous;
  const filled = state.content.reduce((acc, tokens, block) => acc + (state.refCounts[block] ? tokens.length : 0), 0);
  const inUse = state.refCounts.filter((count) => count > 0).length * blockSize;
  const paged = { used: filled, reserved: 0, internal: inUse - filled, external: 0, free: total - inUse, total };
  const share = (part, whole) => `${(100 * part) / whole}%`;
  const strip = element("div", { class: "oi-strip", role: "img", "aria-label": "memory with contiguous reservations" }, ...contiguous.parts.map((part) =>
    element("div", { class: "oi-piece", style: `${paint(part.id)};left:${share(part.start, total)};width:${share(part.length, total)}`, "data-seqs": part.id, title: `${part.id}: ${part.used} tokens in ${part.length} reserved slots` },
      element("i", { class: "oi-used", style: `width:${share(part.used, part.length)}` }, String(part.id)),
      element("i", { class: "oi-reserved", style: `width:${share(part.final - part.used, part.length)}` }),
      element("i", { class: "oi-internal", style: `width:${share(part.length - part.final, part.length)}` }))));
  const { waiting, need, external } = contiguous;
  const queue = waiting.length
    ? `${waiting.join(", ")} wait${waiting.length > 1 ? "" : "s"}: ${need} slots in a row are needed, ${external} are free.`
    : "Nobody waits.";
  return [strip, element("div", { class: "oi-muted", "aria-live": "polite" }, queue),
    usageBar("contiguous", contiguous), usageBar("pages", paged), legend()];
}

function usageBar(name, usage) {
  const taken = usage.total - usage.free;
  const share = taken ? Math.round((100 * usage.used) / taken) : 100;
  return element("div", { class: "oi-usage" }, element("span", {}, name),
    element("div", { class: "oi-track", role: "img", "aria-label": KINDS.map(([kind, text]) => `${usage[kind]} slots ${text}`).join(", ") },
      ...KINDS.map(([kind]) => element("i", { class: `oi-${kind}`, style: `width:${(100 * usage[kind]) / usage.total}%` }))),
    element("span", { class: "oi-mono" }, `${share} % of what is taken`));
}

const legend = () => element("div", { class: "oi-legend" }, ...KINDS.map(([kind, text]) => element("span", {}, element("i", { class: `oi-swatch oi-${kind}` }), text)));
