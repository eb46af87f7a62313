// KV Cache Memory Manager. Plays the event log of optinfer.kv_cache.BlockManager, and goes on from any point of it
// with `BlockManager` below, a line-by-line port that a test holds equal to the Python one: same events, same state.

// ---- SHA-256, because hashes must be the Python manager's (FIPS 180-4; crypto.subtle is asynchronous) ------------

const isPrime = (n) => { for (let d = 2; d * d <= n; d++) if (n % d === 0) return false; return true; };
const PRIMES = Array.from({ length: 312 }, (_, n) => n).filter((n) => n > 1 && isPrime(n)).slice(0, 64);
const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32) | 0;
const ROUND = PRIMES.map((p) => fraction(Math.cbrt(p)));

function sha256(bytes) {
  const padded = new Uint8Array(((bytes.length + 8) >> 6) * 64 + 64);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 4, bytes.length * 8);
  const digest = PRIMES.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
  const rotate = (x, n) => (x >>> n) | (x << (32 - n));
  const w = new Int32Array(64);
  for (let start = 0; start < padded.length; start += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(start + 4 * i);
    for (let i = 16; i < 64; i++) {
      const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
      const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    let [a, b, c, d, e, f, g, h] = digest;
    for (let i = 0; i < 64; i++) {
      const t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[i] + w[i];
      const t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((x, i) => { digest[i] = (digest[i] + x) | 0; });
  }
  return digest.map((x) => (x >>> 0).toString(16).padStart(8, "0")).join("");
}

const rootHash = (salt) => sha256(new TextEncoder().encode(salt));

function hashBlock(parent, tokens) {
  const bytes = new Uint8Array(32 + 4 * tokens.length);
  for (let i = 0; i < 32; i++) bytes[i] = parseInt(parent.slice(2 * i, 2 * i + 2), 16);
  const view = new DataView(bytes.buffer);
  tokens.forEach((token, i) => view.setInt32(32 + 4 * i, token, true));
  return sha256(bytes);
}

// ---- the block manager: see optinfer/kv_cache/block_manager.py for what and why ----------------------------------

class Refused extends Error {
  constructor(kind, message) { super(message); this.kind = kind; }
}

class BlockManager {
  constructor(numBlocks, blockSize, { prefixCaching = true, watermark = 0 } = {}) {
    Object.assign(this, { numBlocks, blockSize, prefixCaching });
    this.watermarkBlocks = Math.floor(watermark * numBlocks);
    this.events = [];
    this.sequences = new Map();
    this.refCounts = Array(numBlocks).fill(0);
    this.freeQueue = Array.from({ length: numBlocks }, (_, block) => block);
    this.hashes = Array(numBlocks).fill(null);
    this.cached = new Map(); // hash -> blocks
  }

  // Go on from a state that `replay` rebuilt from the Python manager's log.
  static from(state, blockSize, options) {
    const m = new BlockManager(state.refCounts.length, blockSize, options);
    m.refCounts = [...state.refCounts];
    m.freeQueue = [...state.freeQueue];
    m.hashes = [...state.hashes];
    m.hashes.forEach((hash, block) => { if (hash) m.cached.set(hash, [...(m.cached.get(hash) ?? []), block]); });
    for (const [seqId, table] of state.tables) {
      const tokens = [...state.tokens.get(seqId)];
      const chain = [];
      while (chain.length < Math.floor(tokens.length / blockSize) && m.hashes[table[chain.length]])
        chain.push(m.hashes[table[chain.length]]);
      m.sequences.set(seqId, { tokens, table: [...table], chain, root: rootHash("") });
    }
    return m;
  }

  allocate(seqId, tokenIds, { salt = "", commit = true } = {}) {
    this.#checkNew(seqId);
    const tokens = this.#checkTokens(tokenIds);
    const root = rootHash(salt);
    const [hits, chain] = this.#findHits(tokens, root);
    const numNew = Math.ceil(tokens.length / this.blockSize) - hits.length;
    const hitsInQueue = hits.filter((block) => this.refCounts[block] === 0).length;
    this.#require(numNew, this.freeQueue.length - hitsInQueue - this.watermarkBlocks);
    const numCached = hits.length * this.blockSize;
    this.#log("SequenceAllocated", { seq_id: seqId, token_ids: [...tokens], num_cached_tokens: numCached });
    const seq = { tokens, table: [], chain, root };
    this.sequences.set(seqId, seq);
    for (const block of hits) {
      if (this.refCounts[block] === 0) this.freeQueue.splice(this.freeQueue.indexOf(block), 1);
      this.refCounts[block] += 1;
      seq.table.push(block);
      this.#log("BlockHit", { seq_id: seqId, block });
    }
    for (let i = 0; i < numNew; i++) this.#grow(seqId, seq);
    if (commit) this.#extendChain(seq, tokens.length);
  }

  append(seqId, tokenIds, { commit = true } = {}) {
    const seq = this.#get(seqId);
    const tokens = this.#checkTokens(tokenIds);
    const last = seq.table.at(-1);
    const partial = seq.tokens.length % this.blockSize > 0;
    const shared = partial && this.refCounts[last] > 1;
    const numNew = Math.ceil((seq.tokens.length + tokens.length) / this.blockSize) - seq.table.length;
    this.#require(numNew + shared, this.freeQueue.length);
    this.#log("TokensAppended", { seq_id: seqId, token_ids: [...tokens] });
    if (shared) {
      const target = this.#take();
      this.refCounts[last] -= 1;
      seq.table[seq.table.length - 1] = target;
      this.#log("BlockCopied", { seq_id: seqId, source: last, target });
    } else if (partial) this.#forget(last, false);
    for (let i = 0; i < numNew; i++) this.#grow(seqId, seq);
    seq.tokens.push(...tokens);
    if (commit) this.#extendChain(seq, seq.tokens.length);
  }

  commit(seqId, numTokens) {
    const seq = this.#get(seqId);
    this.#checkLength(seq, numTokens);
    this.#log("TokensCommitted", { seq_id: seqId, num_tokens: numTokens });
    this.#extendChain(seq, numTokens);
  }

  fork(parentId, childId) {
    const parent = this.#get(parentId);
    this.#checkNew(childId);
    this.#log("SequenceForked", { parent_id: parentId, child_id: childId });
    for (const block of parent.table) this.refCounts[block] += 1;
    const { tokens, table, chain, root } = parent;
    this.sequences.set(childId, { tokens: [...tokens], table: [...table], chain: [...chain], root });
  }

  truncate(seqId, numTokens) {
    const seq = this.#get(seqId);
    this.#checkLength(seq, numTokens);
    this.#log("SequenceTruncated", { seq_id: seqId, num_tokens: numTokens });
    seq.tokens.length = numTokens;
    seq.chain.length = Math.min(seq.chain.length, Math.floor(numTokens / this.blockSize));
    this.#release(seqId, seq, Math.ceil(numTokens / this.blockSize));
  }

  free(seqId, preempted = false) {
    const seq = this.#get(seqId);
    this.#log("SequenceFreed", { seq_id: seqId, preempted });
    this.sequences.delete(seqId);
    this.#release(seqId, seq, 0);
  }

  preempt(seqId) { this.free(seqId, true); }

  #take() {
    const block = this.freeQueue[0];
    this.#forget(block, true);
    this.freeQueue.shift();
    this.refCounts[block] = 1;
    return block;
  }

  #grow(seqId, seq) {
    const block = this.#take();
    seq.table.push(block);
    this.#log("BlockTaken", { seq_id: seqId, block });
  }

  #release(seqId, seq, keep) {
    const unhashed = [];
    while (seq.table.length > keep) {
      const block = seq.table.pop();
      this.refCounts[block] -= 1;
      this.#log("BlockReleased", { seq_id: seqId, block, ref_count: this.refCounts[block] });
      if (this.refCounts[block] === 0) (this.hashes[block] === null ? unhashed : this.freeQueue).push(block);
    }
    this.freeQueue.unshift(...unhashed);
  }

  #findHits(tokens, root) {
    const hits = [], chain = [], size = this.blockSize;
    if (this.prefixCaching) {
      for (let start = 0; start < Math.floor((tokens.length - 1) / size) * size; start += size) {
        const hash = hashBlock(chain.at(-1) ?? root, tokens.slice(start, start + size));
        if (!this.cached.has(hash)) break;
        hits.push(this.cached.get(hash)[0]);
        chain.push(hash);
      }
    }
    return [hits, chain];
  }

  #extendChain(seq, numTokens) {
    if (!this.prefixCaching) return;
    const size = this.blockSize;
    for (let i = seq.chain.length; i < Math.floor(numTokens / size); i++) {
      const hash = hashBlock(seq.chain.at(-1) ?? seq.root, seq.tokens.slice(i * size, (i + 1) * size));
      seq.chain.push(hash);
      const block = seq.table[i];
      if (this.hashes[block] === null) {
        this.hashes[block] = hash;
        if (!this.cached.has(hash)) this.cached.set(hash, []);
        this.cached.get(hash).push(block);
        this.#log("BlockCached", { block, hash });
      }
    }
  }

  #forget(block, evicted) {
    const hash = this.hashes[block];
    if (hash === null) return;
    this.hashes[block] = null;
    const others = this.cached.get(hash).filter((other) => other !== block);
    if (others.length) this.cached.set(hash, others); else this.cached.delete(hash);
    this.#log("BlockForgotten", { block, hash, evicted });
  }

  #get(seqId) {
    if (!this.sequences.has(seqId)) throw new Refused("UnknownSequence", `sequence ${seqId} is not allocated`);
    return this.sequences.get(seqId);
  }
  #checkNew(seqId) {
    if (this.sequences.has(seqId)) throw new Refused("DuplicateSequence", `sequence ${seqId} is allocated already`);
  }
  #checkTokens(tokens) {
    if (!tokens.length) throw new Refused("ValueError", "at least one token is needed");
    if (tokens.some((t) => !(t >= 0 && t < 2 ** 31))) throw new Refused("ValueError", "token id out of range");
    return [...tokens];
  }
  #checkLength(seq, n) {
    if (!(n >= 1 && n <= seq.tokens.length)) throw new Refused("ValueError", `need 1 to ${seq.tokens.length} tokens, got ${n}`);
  }
  #require(needed, available) {
    if (needed > available)
      throw new Refused("OutOfBlocks", `needs ${needed} new blocks, ${Math.max(0, available)} available`);
  }
  #log(type, fields) { this.events.push({ type, ...fields }); }
}

// ---- replay of a log, and the contiguous lane over the same log --------------------------------------------------

function replay(events, numBlocks) {
  const s = {
    tokens: new Map(), tables: new Map(), refCounts: Array(numBlocks).fill(0), hashes: Array(numBlocks).fill(null),
    freeQueue: Array.from({ length: numBlocks }, (_, block) => block), content: Array.from({ length: numBlocks }, () => []),
    preempted: new Map(),
  };
  let unhashed = [];
  const settle = () => { s.freeQueue.unshift(...unhashed); unhashed = []; };
  const take = (block) => { s.freeQueue.splice(s.freeQueue.indexOf(block), 1); s.refCounts[block] = 1; };
  const operations = {
    SequenceAllocated: (e) => { s.tokens.set(e.seq_id, [...e.token_ids]); s.tables.set(e.seq_id, []); s.preempted.delete(e.seq_id); },
    TokensAppended: (e) => { s.tokens.get(e.seq_id).push(...e.token_ids); },
    TokensCommitted: () => {},
    SequenceForked: (e) => {
      s.tokens.set(e.child_id, [...s.tokens.get(e.parent_id)]);
      s.tables.set(e.child_id, [...s.tables.get(e.parent_id)]);
      for (const block of s.tables.get(e.child_id)) s.refCounts[block] += 1;
    },
    SequenceTruncated: (e) => { s.tokens.get(e.seq_id).length = e.num_tokens; },
    SequenceFreed: (e) => {
      if (e.preempted) s.preempted.set(e.seq_id, s.tokens.get(e.seq_id));
      s.tokens.delete(e.seq_id);
    },
  };
  const blocks = {
    BlockTaken: (e) => { take(e.block); s.content[e.block] = []; s.tables.get(e.seq_id).push(e.block); },
    BlockHit: (e) => {
      if (s.refCounts[e.block] === 0) s.freeQueue.splice(s.freeQueue.indexOf(e.block), 1);
      s.refCounts[e.block] += 1;
      s.tables.get(e.seq_id).push(e.block);
    },
    BlockCopied: (e) => {
      take(e.target);
      s.content[e.target] = [...s.content[e.source]];
      s.refCounts[e.source] -= 1;
      s.tables.get(e.seq_id).splice(-1, 1, e.target);
    },
    BlockReleased: (e) => {
      s.refCounts[e.block] -= 1;
      s.tables.get(e.seq_id).pop();
      if (e.ref_count === 0) (s.hashes[e.block] === null ? unhashed : s.freeQueue).push(e.block);
      if (!s.tables.get(e.seq_id).length && !s.tokens.has(e.seq_id)) s.tables.delete(e.seq_id);
    },
    BlockCached: (e) => { s.hashes[e.block] = e.hash; },
    BlockForgotten: (e) => { s.hashes[e.block] = null; },
  };
  for (const event of events) {
    if (operations[event.type]) { settle(); operations[event.type](event); } else blocks[event.type](event);
  }
  settle();
  return s;
}

// What the physical blocks hold, slot by slot: the tokens of whoever owns them, or of the last owner if still cached.
function fillContent(states, blockSize) {
  const content = states[0].content.map(() => []);
  for (const state of states) {
    for (const [seqId, table] of state.tables)
      table.forEach((block, i) => {
        const span = state.tokens.get(seqId).slice(i * blockSize, (i + 1) * blockSize);
        if (span.length >= content[block].length || state.hashes[block] === null) {
          const owners = [...state.tables].filter(([, t]) => t[i] === block);
          const longest = Math.max(...owners.map(([id]) => Math.min(blockSize, state.tokens.get(id).length - i * blockSize)));
          const owner = owners.find(([id]) => Math.min(blockSize, state.tokens.get(id).length - i * blockSize) === longest)[0];
          content[block] = state.tokens.get(owner).slice(i * blockSize, (i + 1) * blockSize);
        }
      });
    state.refCounts.forEach((count, block) => { if (count === 0 && state.hashes[block] === null) content[block] = []; });
    state.content = content.map((tokens) => [...tokens]);
  }
}

const OPERATIONS = new Set(["SequenceAllocated", "TokensAppended", "TokensCommitted", "SequenceForked", "SequenceTruncated", "SequenceFreed"]);

function groupByOperation(events) {
  const groups = [];
  for (const event of events) if (OPERATIONS.has(event.type)) groups.push([event]); else groups.at(-1).push(event);
  return groups;
}

// First fit, one contiguous piece per sequence, reserved on arrival; those that do not fit wait their turn.
function contiguousLane(operations, step, total, policy, maxLen) {
  const lengths = new Map(), prompts = new Map(), finals = new Map();
  for (const [e] of operations) {
    const id = e.seq_id ?? e.child_id;
    if (e.type === "SequenceAllocated") { lengths.set(id, e.token_ids.length); prompts.set(id, e.token_ids.length); }
    if (e.type === "SequenceForked") { lengths.set(id, lengths.get(e.parent_id)); prompts.set(id, lengths.get(id)); }
    if (e.type === "TokensAppended") lengths.set(id, lengths.get(id) + e.token_ids.length);
    if (e.type === "SequenceTruncated") lengths.set(id, e.num_tokens);
    finals.set(id, Math.max(finals.get(id) ?? 0, lengths.get(id)));
  }
  const nextPowerOfTwo = (n) => 2 ** Math.ceil(Math.log2(Math.max(1, n)));
  const reservation = (id) => {
    const need = { max: maxLen, pow2: prompts.get(id) + nextPowerOfTwo(finals.get(id) - prompts.get(id)), oracle: finals.get(id) }[policy];
    return Math.max(finals.get(id), Math.min(need, Math.max(maxLen, finals.get(id))));
  };
  let pieces = [], waiting = [];
  const live = new Map();
  const firstFit = (id) => {
    const need = reservation(id);
    let start = 0;
    for (const piece of [...pieces, { start: total, length: 0 }]) {
      if (piece.start - start >= need) {
        pieces = [...pieces, { id, start, length: need }].sort((a, b) => a.start - b.start);
        return true;
      }
      start = piece.start + piece.length;
    }
    return false;
  };
  for (const [e] of operations.slice(0, step)) {
    const id = e.seq_id ?? e.child_id;
    if (e.type === "SequenceAllocated") { live.set(id, e.token_ids.length); waiting.push(id); }
    if (e.type === "SequenceForked") { live.set(id, live.get(e.parent_id)); waiting.push(id); }
    if (e.type === "TokensAppended") live.set(id, live.get(id) + e.token_ids.length);
    if (e.type === "SequenceTruncated") live.set(id, e.num_tokens);
    if (e.type === "SequenceFreed") {
      live.delete(id);
      pieces = pieces.filter((piece) => piece.id !== id);
      waiting = waiting.filter((other) => other !== id);
    }
    while (waiting.length && firstFit(waiting[0])) waiting.shift();
  }
  const parts = pieces.map((piece) => ({ ...piece, used: live.get(piece.id), final: finals.get(piece.id) }));
  const sum = (f) => parts.reduce((acc, part) => acc + f(part), 0);
  const free = total - sum((p) => p.length);
  return {
    parts, waiting, need: waiting.length ? reservation(waiting[0]) : 0,
    used: sum((p) => p.used), reserved: sum((p) => p.final - p.used), internal: sum((p) => p.length - p.final),
    external: waiting.length ? free : 0, free: waiting.length ? 0 : free, total,
  };
}

// ---- the figure --------------------------------------------------------------------------------------------------

const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a7d00", "#7a6fd0"];
const DARK_TEXT = new Set(["#e69f00", "#cc79a7", "#56b4e9"]);
const SYSTEM = [0, 1, 2, 3, 4, 5, 6, 7];

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.onclick = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function render({ model, el }) {
  // JupyterLab takes keys for its own commands (x cuts the cell) unless the focused element says no.
  el.addEventListener("focusin", ({ target }) => { target.dataset.lmSuppressShortcuts = "true"; });
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
  const names = [];
  const colorOf = (seqId) => { if (!names.includes(seqId)) names.push(seqId); return COLORS[names.indexOf(seqId) % COLORS.length]; };
  const paint = (seqId) => `--c:${colorOf(seqId)};--t:${DARK_TEXT.has(colorOf(seqId)) ? "#10151a" : "#ffffff"}`;

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
  const freshName = () => {
    const taken = new Set([...now().tables.keys(), ...now().preempted.keys()].map(String));
    for (let i = 0; ; i++) { const name = String.fromCharCode(65 + (i % 26)) + (i < 26 ? "" : Math.floor(i / 26)); if (!taken.has(name)) return name; }
  };
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
    const node = h("button", { type: "button", "aria-label": label, "aria-keyshortcuts": key, onclick: run }, label, h("kbd", {}, key));
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
  const back = h("button", { type: "button", "aria-label": "Step back", onclick: () => { stop(); go(step - 1); } }, "◀");
  const play = h("button", { type: "button", class: "oi-primary", "aria-label": "Play", onclick: toggle }, "▶ Play");
  const forward = h("button", { type: "button", "aria-label": "Step forward", onclick: () => { stop(); go(step + 1); } }, "▶");
  const reset = h("button", { type: "button", "aria-label": "Reset", onclick: () => { stop(); operations = []; rebuild(); selected = null; go(0); } }, "Reset");
  const scrub = h("input", { type: "range", min: 0, "aria-label": "Position in the event log" });
  scrub.oninput = () => { stop(); go(Number(scrub.value)); };
  const position = h("span", { class: "oi-mono oi-muted" });
  const story = h("div", { class: "oi-story", "aria-live": "polite" });
  const panes = { logical: h("div"), tables: h("div"), physical: h("div", { class: "oi-vram" }) };
  const lane = h("div", { class: "oi-lane" });
  const choice = h("select", { "aria-label": "Contiguous policy" },
    ...[["max", "reserve the maximum"], ["pow2", "reserve the next power of two"], ["oracle", "reserve what an oracle foresees"]].map(([value, text]) => h("option", { value }, text)));
  choice.value = policy;
  choice.onchange = () => { policy = choice.value; draw(); };

  const root = h("div", { class: "oi oi-kv", tabindex: 0, role: "group", "aria-label": "KV cache memory manager. Arrow keys step, space plays." },
    h("div", { class: "oi-row oi-bar" }, back, play, forward, scrub, position, reset),
    h("div", { class: "oi-row" }, ...buttons.map((b) => b.node)),
    story,
    h("div", { class: "oi-panes" },
      h("section", {}, h("h4", {}, "Logical sequences"), panes.logical),
      h("section", {}, h("h4", {}, "Block tables"), panes.tables)),
    h("section", {}, h("h4", {}, "Physical VRAM pages"), panes.physical),
    h("section", { class: "oi-twin" },
      h("div", { class: "oi-row" }, h("h4", {}, "The same requests without pages:"), choice), lane));
  el.append(root);

  // -- linked highlighting: every mark carries data-block and/or data-seqs
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

  function tell() {
    if (refusal) return ["refused", refusal];
    if (step === 0) return ["", operations.length ? "An empty pool. Press play, or step through what the manager did." : "An empty pool. Press “New request”."];
    const [operation, ...rest] = operations[step - 1];
    const of = (type) => rest.filter((event) => event.type === type);
    const list = (events) => events.map((event) => event.block).join(", ");
    const extra = [];
    const evicted = of("BlockForgotten").filter((e) => e.evicted);
    if (evicted.length) extra.push(`Evicted, as least recently used: what block${evicted.length > 1 ? "s" : ""} ${list(evicted)} had cached.`);
    const id = operation.seq_id ?? operation.child_id;
    switch (operation.type) {
      case "SequenceAllocated": {
        const n = operation.num_cached_tokens, total = operation.token_ids.length;
        const again = states[step - 1].preempted.has(id);
        return [n ? "prefix hit" : "new", `${again ? "Back again" : "New request"} ${id}: ${total} tokens. ` +
          (n ? `Block${of("BlockHit").length > 1 ? "s" : ""} ${list(of("BlockHit"))} already hold${of("BlockHit").length > 1 ? "" : "s"} its first ${n} tokens, so only ${total - n} are computed. ` : "") +
          `${of("BlockTaken").length} new block${of("BlockTaken").length === 1 ? "" : "s"}. ` + extra.join(" ")];
      }
      case "TokensAppended": {
        const copy = of("BlockCopied")[0];
        if (copy) return ["copy-on-write", `Copy-on-write: ${id} wants to write in block ${copy.source}, which others use too. Block ${copy.source} is copied to ${copy.target}, and ${id} writes there. ${extra.join(" ")}`];
        const taken = of("BlockTaken");
        return [extra.length ? "eviction" : "grow", `${id} grows by ${operation.token_ids.length}: ` + (taken.length ? `its last block was full, so it takes block ${list(taken)}. ` : "the token fits in its last block; no memory changes hands. ") + extra.join(" ")];
      }
      case "SequenceForked": return ["fork", `Fork: ${id} is a second continuation of ${operation.parent_id}. It takes no memory; reference counts go up.`];
      case "SequenceTruncated": return ["truncate", `${id} is cut back to ${operation.num_tokens} tokens (rejected drafts, say).`];
      case "TokensCommitted": return ["commit", `The first ${operation.num_tokens} tokens of ${id} are final.`];
      case "SequenceFreed": {
        const length = states[step - 1].tokens.get(id).length;
        const kept = of("BlockReleased").filter((e) => e.ref_count === 0 && now().hashes[e.block]).length;
        return operation.preempted
          ? ["preemption", `Preemption: ${id} gives its memory back and will recompute ${length} tokens later, less what is still cached. Its answer does not change.`]
          : ["finish", `${id} is finished. ${kept ? `${kept} of its full blocks stay cached until someone needs the room.` : ""}`];
      }
    }
    return ["", operation.type];
  }

  function draw() {
    const s = now();
    const fresh = step > 0 ? operations[step - 1].slice(1) : [];
    const beat = new Map(); // block -> what just happened to it
    for (const e of fresh) {
      if (e.type === "BlockCopied") { beat.set(e.source, "source"); beat.set(e.target, "copied"); }
      else if (e.type === "BlockForgotten" && e.evicted) beat.set(e.block, "evicted");
      else if (e.type === "BlockTaken") beat.set(e.block, beat.get(e.block) === "evicted" ? "evicted" : "taken");
      else if (e.type === "BlockHit") beat.set(e.block, "hit");
      else if (e.type === "BlockReleased" && e.ref_count === 0) beat.set(e.block, "released");
    }
    const live = [...s.tables.keys()];
    for (const operation of operations) colorOf(operation[0].seq_id ?? operation[0].child_id);
    if (!live.includes(selected)) selected = live.at(-1) ?? null;
    buttons.forEach((b) => { b.node.disabled = b.needsSequence && selected === null; });
    buttons.forEach((b) => { if (b.needsSequence) b.node.setAttribute("aria-label", selected === null ? b.label : `${b.label} of ${selected}`); });
    play.textContent = timer ? "❚❚ Pause" : "▶ Play";
    play.setAttribute("aria-label", timer ? "Pause" : "Play");
    back.disabled = step === 0;
    forward.disabled = step === operations.length;
    scrub.max = operations.length;
    scrub.value = step;
    position.textContent = `${step} / ${operations.length}`;
    const [icon, text] = tell();
    story.replaceChildren(h("span", { class: "oi-beat-name" }, icon), text);
    story.classList.toggle("oi-refused", Boolean(refusal));

    const owners = Array.from({ length: numBlocks }, () => []);
    for (const [id, table] of s.tables) table.forEach((block) => owners[block].push(id));
    const chips = (id, tokens, table) => {
      const groups = [];
      for (let i = 0; i * blockSize < tokens.length; i++) {
        groups.push(h("span", { class: "oi-group", tabindex: table ? 0 : null, "data-block": table?.[i], "data-seqs": table ? id : null,
          "aria-label": table ? `${id}, block ${i} of the sequence, in page ${table[i]}` : null },
          ...tokens.slice(i * blockSize, (i + 1) * blockSize).map((t) => h("span", { class: "oi-chip" }, word(t)))));
      }
      return groups;
    };
    const rows = live.map((id) => h("div", { class: `oi-seq${id === selected ? " oi-selected" : ""}`, style: paint(id) },
      h("button", { type: "button", class: "oi-name", "data-seq": id, "aria-pressed": id === selected, "aria-label": `Select sequence ${id}`, onclick: () => { selected = id; draw(); } }, String(id)),
      h("div", { class: "oi-chips" }, ...chips(id, s.tokens.get(id), s.tables.get(id)))));
    for (const [id, tokens] of s.preempted) {
      rows.push(h("div", { class: "oi-seq oi-waiting", style: paint(id) },
        h("button", { type: "button", class: "oi-name", "aria-label": `Resume ${id}`, title: "Resume", onclick: () => act((m) => { m.allocate(id, tokens); selected = id; }) }, `${id} ↻`),
        h("div", { class: "oi-chips" }, ...chips(id, tokens, null), h("em", { class: "oi-muted" }, "preempted, waits"))));
    }
    panes.logical.replaceChildren(...(rows.length ? rows : [h("p", { class: "oi-muted" }, "no sequences")]));
    panes.tables.replaceChildren(...(live.length ? live.map((id) => h("div", { class: "oi-seq", style: paint(id) },
      h("span", { class: "oi-name", "data-seq": id }, String(id)),
      h("div", { class: "oi-chips" }, ...s.tables.get(id).map((block, i) =>
        h("span", { class: "oi-entry", tabindex: 0, "data-block": block, "data-seqs": id, "aria-label": `entry ${i} of ${id}: page ${block}` },
          h("small", {}, `${i}→`), String(block)))))) : [h("p", { class: "oi-muted" }, "no tables")]));

    panes.physical.replaceChildren(...owners.map((ids, block) => {
      const free = s.refCounts[block] === 0, cached = s.hashes[block] !== null;
      const stripes = ids.length > 1
        ? `linear-gradient(135deg, ${ids.map((id, i) => `${colorOf(id)} ${(100 * i) / ids.length}% ${(100 * (i + 1)) / ids.length}%`).join(", ")})`
        : ids.length ? colorOf(ids[0]) : "transparent";
      const rank = s.freeQueue.indexOf(block);
      const filled = s.content[block].length;
      const slots = Array.from({ length: blockSize }, (_, i) => h("span", { class: i < filled ? "oi-slot oi-full" : "oi-slot" }, i < filled ? word(s.content[block][i]) : ""));
      const description = `page ${block}: ` + (free ? `free, number ${rank + 1} to be reused` : `used by ${ids.join(", ")}`) + (cached ? ", cached" : "") + `, ${filled} of ${blockSize} slots filled`;
      return h("div", { class: `oi-page${free ? " oi-free" : ""}${free && cached ? " oi-cached" : ""}${beat.has(block) ? ` oi-beat oi-${beat.get(block)}` : ""}`,
        style: `--p:${stripes}`, tabindex: 0, "data-block": block, "data-seqs": ids.join("\n"), "aria-label": description, title: description },
        h("div", { class: "oi-head" }, h("b", {}, String(block)),
          free ? null : h("span", { class: "oi-ref", title: "reference count" }, `×${s.refCounts[block]}`),
          h("span", { class: "oi-owners" }, free ? "" : ids.join(" ")),
          free ? h("span", { class: "oi-rank", title: "place in the free queue" }, `q${rank + 1}`) : null,
          cached ? h("span", { class: "oi-hash oi-mono", title: `content hash ${s.hashes[block]}` }, `#${s.hashes[block].slice(0, 3)}`) : null),
        h("div", { class: "oi-slots" }, ...slots),
        beat.has(block) ? h("span", { class: "oi-tag" }, { source: "shared", copied: "copy", evicted: "evicted", taken: "new", hit: "hit", released: cached ? "kept" : "freed" }[beat.get(block)]) : null);
    }));
    const copy = fresh.find((e) => e.type === "BlockCopied");
    if (copy) arrow(copy.source, copy.target);

    // the twin lane
    const total = numBlocks * blockSize;
    const filled = s.content.reduce((acc, tokens, block) => acc + (s.refCounts[block] ? tokens.length : 0), 0);
    const inUse = s.refCounts.filter((count) => count > 0).length * blockSize;
    const paged = { used: filled, reserved: 0, internal: inUse - filled, external: 0, free: total - inUse, total };
    const other = contiguousLane(operations, step, total, policy, model.get("max_len"));
    const strip = h("div", { class: "oi-strip", role: "img", "aria-label": "memory with contiguous reservations" }, ...other.parts.map((part) => {
      const piece = h("div", { class: "oi-piece", style: `${paint(part.id)};left:${(100 * part.start) / total}%;width:${(100 * part.length) / total}%`, "data-seqs": part.id, title: `${part.id}: ${part.used} tokens in ${part.length} reserved slots` },
        h("i", { class: "oi-used", style: `width:${(100 * part.used) / part.length}%` }, String(part.id)),
        h("i", { class: "oi-reserved", style: `width:${(100 * (part.final - part.used)) / part.length}%` }),
        h("i", { class: "oi-internal", style: `width:${(100 * (part.length - part.final)) / part.length}%` }));
      return piece;
    }));
    const waiting = other.waiting.length
      ? `${other.waiting.join(", ")} wait${other.waiting.length > 1 ? "" : "s"}: ${other.need} slots in a row are needed, ${other.external} are free.`
      : "Nobody waits.";
    lane.replaceChildren(strip, h("div", { class: "oi-muted", "aria-live": "polite" }, waiting),
      usageBar("contiguous", other), usageBar("pages", paged), legend());
  }

  const KINDS = [["used", "hold tokens"], ["reserved", "reserved for later"], ["internal", "never used"], ["external", "free, but useless to those who wait"], ["free", "free"]];
  const usageBar = (name, usage) => {
    const taken = usage.total - usage.free;
    const share = taken ? Math.round((100 * usage.used) / taken) : 100;
    return h("div", { class: "oi-usage" }, h("span", {}, name),
      h("div", { class: "oi-track", role: "img", "aria-label": KINDS.map(([kind, text]) => `${usage[kind]} slots ${text}`).join(", ") },
        ...KINDS.map(([kind]) => h("i", { class: `oi-${kind}`, style: `width:${(100 * usage[kind]) / usage.total}%` }))),
      h("span", { class: "oi-mono" }, `${share} % of what is taken`));
  };
  const legend = () => h("div", { class: "oi-legend" }, ...KINDS.map(([kind, text]) => h("span", {}, h("i", { class: `oi-swatch oi-${kind}` }), text)));

  function arrow(source, target) {
    const box = panes.physical.getBoundingClientRect();
    const [a, b] = [source, target].map((block) => panes.physical.children[block].getBoundingClientRect());
    const x = (r) => r.left - box.left + r.width / 2, y = (r) => r.top - box.top + r.height / 2;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "oi-arrow");
    svg.setAttribute("aria-hidden", "true");
    const bend = Math.max(18, Math.abs(x(b) - x(a)) / 6);
    const mx = (x(a) + x(b)) / 2, my = (y(a) + y(b)) / 2 - bend;
    const angle = Math.atan2(y(b) - my, x(b) - mx), tip = [x(b) - 10 * Math.cos(angle), y(b) - 10 * Math.sin(angle)];
    const wing = (d) => `L${tip[0] - 9 * Math.cos(angle + d)},${tip[1] - 9 * Math.sin(angle + d)}`;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${x(a)},${y(a)} Q${mx},${my} ${tip[0]},${tip[1]} ${wing(0.5)} M${tip[0]},${tip[1]} ${wing(-0.5)}`);
    svg.append(path);
    panes.physical.append(svg);
  }

  const fromModel = () => { stop(); operations = groupByOperation(model.get("events")); rebuild(); go(Math.min(model.get("step"), operations.length)); };
  model.on("change:events", fromModel);
  rebuild();
  draw();
  return () => { stop(); model.off("change:events", fromModel); };
}

export default { render, BlockManager, Refused, replay, contiguousLane, groupByOperation, sha256 };
