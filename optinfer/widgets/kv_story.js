// What the operation before `step` did, as a name and a sentence.
export function tell(operations, states, step) {
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
      const kept = of("BlockReleased").filter((e) => e.ref_count === 0 && states[step].hashes[e.block]).length;
      return operation.preempted
        ? ["preemption", `Preemption: ${id} gives its memory back and will recompute ${length} tokens later, less what is still cached. Its answer does not change.`]
        : ["finish", `${id} is finished. ${kept ? `${kept} of its full blocks stay cached until someone needs the room.` : ""}`];
    }
  }
  return ["", operation.type];
}
