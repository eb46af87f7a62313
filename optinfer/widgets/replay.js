// The state of the pool at any point of a manager's log, as `replay` of optinfer/kv_cache/events.py rebuilds it.

export function replay(events, numBlocks) {
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
export function fillContent(states, blockSize) {
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

export function groupByOperation(events) {
  const groups = [];
  for (const event of events) if (OPERATIONS.has(event.type)) groups.push([event]); else groups.at(-1).push(event);
  return groups;
}
