// First fit, one contiguous piece per sequence, reserved on arrival; those that do not fit wait their turn.
export function contiguousLane(operations, step, total, policy, maxLen) {
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
