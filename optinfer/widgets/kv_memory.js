// KV Cache Memory Manager. Plays the event log of optinfer.kv_cache.BlockManager, and goes on from any point of it with
// the port in block_manager.js: same events, same state.
import { BlockManager, Refused } from "./block_manager.js";
import { contiguousLane } from "./contiguous_lane.js";
import { element, keepKeys } from "./dom.js";
import { arrow, beatOf, makePalette, pages, sequenceRows, tableRows, twinLane } from "./kv_panes.js";
import { tell } from "./kv_story.js";
import { fillContent, groupByOperation, replay } from "./replay.js";

const SYSTEM = [0, 1, 2, 3, 4, 5, 6, 7];

// A, B, …, Z, A1, …
function firstFree(taken) {
  for (let i = 0; ; i++) {
    const name = String.fromCharCode(65 + (i % 26)) + (i < 26 ? "" : Math.floor(i / 26));
    if (!taken.has(name)) return name;
  }
}

// A mark under the pointer or the focus lights up what belongs to it: every mark carries data-block or data-seqs.
function linkMarks(root) {
  const light = (target) => {
    const mark = target?.closest?.("[data-block],[data-seq]");
    root.classList.toggle("oi-linking", Boolean(mark));
    root.querySelectorAll(".oi-lit").forEach((node) => node.classList.remove("oi-lit"));
    if (!mark) return;
    const query = mark.dataset.block !== undefined
      ? [...root.querySelectorAll(`[data-block="${mark.dataset.block}"]`)]
      : [...root.querySelectorAll("[data-seqs]")].filter((n) => n.dataset.seqs.split("\n").includes(mark.dataset.seq));
    query.forEach((node) => node.classList.add("oi-lit"));
  };
  root.addEventListener("mouseover", (event) => light(event.target));
  root.addEventListener("mouseleave", () => light(null));
  root.addEventListener("focusin", (event) => light(event.target));
}

function render({ model, el }) {
  keepKeys(el);
  const blockSize = model.get("block_size"), numBlocks = model.get("num_blocks"), words = model.get("words");
  const options = { prefixCaching: model.get("prefix_caching") };
  const word = (token) => words[token] ?? `t${token}`;
  let operations = groupByOperation(model.get("events"));
  let states = [];
  let step = Math.min(model.get("step"), operations.length);
  let selected = null, policy = model.get("policy"), timer = null, refusal = "", random = 7;
  const nextRandom = (n) => { random = (random * 1103515245 + 12345) % 2 ** 31; return Math.floor((random / 2 ** 31) * n); };

  const rebuild = () => {
    states = Array.from({ length: operations.length + 1 }, (_, n) => replay(operations.slice(0, n).flat(), numBlocks));
    fillContent(states, blockSize);
  };
  const now = () => states[step];
  const palette = makePalette();

  // -- what the buttons do: one operation on a manager that starts from the state on screen; the future is rewritten.
  function act(operation) {
    refusal = "";
    const manager = BlockManager.from(now(), blockSize, options);
    try {
      operation(manager);
      operations = [...operations.slice(0, step), ...groupByOperation(manager.events)];
      rebuild();
      step = operations.length;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      refusal = `Refused, nothing changed: ${error.message}. Finish or preempt a sequence first.`;
    }
    draw();
  }
  const freshName = () => firstFree(new Set([...now().tables.keys(), ...now().preempted.keys()].map(String)));
  const someTokens = (n) => Array.from({ length: n }, () => SYSTEM.length + nextRandom(Math.max(1, words.length - SYSTEM.length)));
  const create = (tokens) => { const name = freshName(); act((m) => { m.allocate(name, tokens); selected = name; }); };
  const buttons = [
    ["New request", "n", () => create(someTokens(3 + nextRandom(6)))],
    ["Shared system prompt", "s", () => create([...SYSTEM, ...someTokens(2 + nextRandom(3))])],
    ["Next token", "t", () => act((m) => m.append(selected, someTokens(1)))],
    ["Fork", "f", () => { const child = freshName(); act((m) => m.fork(selected, child)); }],
    ["Preempt", "p", () => act((m) => m.preempt(selected))],
    ["Finish", "x", () => act((m) => m.free(selected))],
  ].map(([label, key, run]) => {
    const node = element("button", { type: "button", "aria-label": label, "aria-keyshortcuts": key, onclick: run }, label, element("kbd", {}, key));
    return { node, key, run, needsSequence: !/New|Shared/.test(label), label };
  });
  const go = (to) => { step = Math.max(0, Math.min(operations.length, to)); refusal = ""; draw(); };
  const stop = () => { clearInterval(timer); timer = null; };
  const toggle = () => {
    if (timer) stop();
    else {
      if (step === operations.length) step = 0;
      timer = setInterval(() => { go(step + 1); if (step === operations.length) { stop(); draw(); } }, model.get("interval_ms"));
    }
    draw();
  };
  const back = element("button", { type: "button", "aria-label": "Step back", onclick: () => { stop(); go(step - 1); } }, "◀");
  const play = element("button", { type: "button", class: "oi-primary", "aria-label": "Play", onclick: toggle }, "▶ Play");
  const forward = element("button", { type: "button", "aria-label": "Step forward", onclick: () => { stop(); go(step + 1); } }, "▶");
  const reset = element("button", { type: "button", "aria-label": "Reset", onclick: () => { stop(); operations = []; rebuild(); selected = null; go(0); } }, "Reset");
  const scrub = element("input", { type: "range", min: 0, "aria-label": "Position in the event log" });
  scrub.oninput = () => { stop(); go(Number(scrub.value)); };
  const position = element("span", { class: "oi-mono oi-muted" });
  const story = element("div", { class: "oi-story", "aria-live": "polite" });
  const panes = { logical: element("div"), tables: element("div"), physical: element("div", { class: "oi-vram" }) };
  const lane = element("div", { class: "oi-lane" });
  const choice = element("select", { "aria-label": "Contiguous policy" },
    ...[["max", "reserve the maximum"], ["pow2", "reserve the next power of two"], ["oracle", "reserve what an oracle foresees"]].map(([value, text]) => element("option", { value }, text)));
  choice.value = policy;
  choice.onchange = () => { policy = choice.value; draw(); };

  const root = element("div", { class: "oi oi-kv", tabindex: 0, role: "group", "aria-label": "KV cache memory manager. Arrow keys step, space plays." },
    element("div", { class: "oi-row oi-bar" }, back, play, forward, scrub, position, reset),
    element("div", { class: "oi-row" }, ...buttons.map((b) => b.node)),
    story,
    element("div", { class: "oi-panes" },
      element("section", {}, element("h4", {}, "Logical sequences"), panes.logical),
      element("section", {}, element("h4", {}, "Block tables"), panes.tables)),
    element("section", {}, element("h4", {}, "Physical VRAM pages"), panes.physical),
    element("section", { class: "oi-twin" },
      element("div", { class: "oi-row" }, element("h4", {}, "The same requests without pages:"), choice), lane));
  el.append(root);

  linkMarks(root);
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onControl = /^(INPUT|SELECT)$/.test(event.target.tagName);
    const button = buttons.find((b) => b.key === event.key);
    if (event.key === "ArrowRight" && !onControl) forward.click();
    else if (event.key === "ArrowLeft" && !onControl) back.click();
    else if (event.key === " " && event.target === root) toggle();
    else if (button && !onControl && !button.node.disabled) button.run();
    else return;
    event.preventDefault();
    event.stopPropagation(); // or JupyterLab's own shortcuts would run too
  });

  const select = (id) => { selected = id; draw(); };
  const resume = (id, tokens) => act((m) => { m.allocate(id, tokens); selected = id; });

  function draw() {
    const state = now();
    const fresh = step > 0 ? operations[step - 1].slice(1) : [];
    for (const [operation] of operations) palette.colorOf(operation.seq_id ?? operation.child_id);
    if (!state.tables.has(selected)) selected = [...state.tables.keys()].at(-1) ?? null;
    drawControls();
    const [icon, text] = refusal ? ["refused", refusal] : tell(operations, states, step);
    story.replaceChildren(element("span", { class: "oi-beat-name" }, icon), text);
    story.classList.toggle("oi-refused", Boolean(refusal));
    const view = { blockSize, word, palette, selected, select, resume };
    panes.logical.replaceChildren(...sequenceRows(state, view));
    panes.tables.replaceChildren(...tableRows(state, view));
    panes.physical.replaceChildren(...pages(state, beatOf(fresh), view));
    const copy = fresh.find((e) => e.type === "BlockCopied");
    if (copy) panes.physical.append(arrow(panes.physical, copy.source, copy.target));
    lane.replaceChildren(...twinLane(state, contiguousLane(operations, step, numBlocks * blockSize, policy, model.get("max_len")), view));
  }

  function drawControls() {
    for (const b of buttons.filter((b) => b.needsSequence)) {
      b.node.disabled = selected === null;
      b.node.setAttribute("aria-label", selected === null ? b.label : `${b.label} of ${selected}`);
    }
    play.textContent = timer ? "❚❚ Pause" : "▶ Play";
    play.setAttribute("aria-label", timer ? "Pause" : "Play");
    back.disabled = step === 0;
    forward.disabled = step === operations.length;
    scrub.max = operations.length;
    scrub.value = step;
    position.textContent = `${step} / ${operations.length}`;
  }

  const fromModel = () => { stop(); operations = groupByOperation(model.get("events")); rebuild(); go(Math.min(model.get("step"), operations.length)); };
  model.on("change:events", fromModel);
  rebuild();
  draw();
  return () => { stop(); model.off("change:events", fromModel); };
}

export default { render, BlockManager, Refused, replay, contiguousLane, groupByOperation };
