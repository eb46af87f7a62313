// A line-by-line port of optinfer/kv_cache/block_manager.py, which says what and why; a test holds the two equal.
import { sha256 } from "./sha256.js";

const rootHash = (salt) => sha256(new TextEncoder().encode(salt));

function hashBlock(parent, tokens) {
  const bytes = new Uint8Array(32 + 4 * tokens.length);
  for (let i = 0; i < 32; i++) bytes[i] = parseInt(parent.slice(2 * i, 2 * i + 2), 16);
  const view = new DataView(bytes.buffer);
  tokens.forEach((token, i) => view.setInt32(32 + 4 * i, token, true));
  return sha256(bytes);
}

export class Refused extends Error {
  constructor(kind, message) { super(message); this.kind = kind; }
}

export class BlockManager {
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
