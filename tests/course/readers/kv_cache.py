"""Readers of lesson 4."""

import math

import torch

from optinfer.course.exercises.kv_cache import combine
from tests.course.readers import wrong


@wrong("kv_cache.bytes_per_token")
def a_head_as_wide_as_the_model(layers, hidden_size, heads, kv_heads, itemsize):
    return 2 * layers * kv_heads * hidden_size * itemsize


@wrong("kv_cache.bytes_per_token", "as if every query head kept a cache")
def the_width_shared_by_the_key_heads(layers, hidden_size, heads, kv_heads, itemsize):
    head_dim = hidden_size // kv_heads
    return 2 * layers * kv_heads * head_dim * itemsize


@wrong("kv_cache.bytes_per_token")
def queries_kept_too(layers, hidden_size, heads, kv_heads, itemsize):
    head_dim = hidden_size // heads
    return layers * (heads + 2 * kv_heads) * head_dim * itemsize


@wrong("kv_cache.bytes_per_token")
def kilobytes(layers, hidden_size, heads, kv_heads, itemsize):
    return 2 * layers * kv_heads * hidden_size / heads * itemsize / 1024


@wrong("kv_cache.waste")
def paged_first(lengths, max_length, block_size):
    contiguous, paged = 0, 0
    for n in lengths:
        contiguous += max_length - n
        paged += math.ceil(n / block_size) * block_size - n
    return paged, contiguous


@wrong("kv_cache.waste")
def one_sequence_behind_the_other(lengths, max_length, block_size):
    total = sum(lengths)
    return max_length * len(lengths) - total, math.ceil(total / block_size) * block_size - total


@wrong("kv_cache.waste")
def reserved_slots(lengths, max_length, block_size):
    return len(lengths) * max_length, sum(math.ceil(n / block_size) * block_size for n in lengths)


@wrong("kv_cache.waste")
def the_longest_decides(lengths, max_length, block_size):
    longest = max(lengths, default=0)
    room = math.ceil(longest / block_size) * block_size
    return sum(max_length - n for n in lengths), sum(room - n for n in lengths)


@wrong("kv_cache.slot_mapping")
def the_end_included(block_table, block_size, start, end):
    slots = []
    for i in range(start, end + 1):
        block, offset = divmod(i, block_size)
        if block < len(block_table):
            slots.append(block_table[block] * block_size + offset)
    return slots


@wrong("kv_cache.slot_mapping")
def blocks_and_offsets(block_table, block_size, start, end):
    return [(block_table[i // block_size], i % block_size) for i in range(start, end)]


@wrong("kv_cache.slot_mapping")
def the_table_begins_at_start(block_table, block_size, start, end):
    return [block_table[(i - start) // block_size] * block_size + i % block_size for i in range(start, end)]


@wrong("kv_cache.slot_mapping")
def neighbors_in_different_blocks(block_table, block_size, start, end):
    blocks = len(block_table)
    return [block_table[i % blocks] * block_size + i // blocks for i in range(start, end)]


@wrong("kv_cache.allocate")
def from_the_back(free, num_tokens, block_size):
    needed = math.ceil(num_tokens / block_size)
    if needed > len(free):
        return None
    rest = len(free) - needed
    return free[rest:], free[:rest]


@wrong("kv_cache.allocate")
def the_callers_list_emptied(free, num_tokens, block_size):
    needed = math.ceil(num_tokens / block_size)
    if needed > len(free):
        return None
    return [free.pop(0) for _ in range(needed)], free


@wrong("kv_cache.allocate")
def an_empty_table_for_too_few(free, num_tokens, block_size):
    needed = math.ceil(num_tokens / block_size)
    if needed > len(free):
        return [], list(free)
    return free[:needed], free[needed:]


@wrong("kv_cache.allocate")
def the_smallest_numbers_first(free, num_tokens, block_size):
    needed = math.ceil(num_tokens / block_size)
    if needed > len(free):
        return None
    ordered = sorted(free)
    return ordered[:needed], ordered[needed:]


@wrong("kv_cache.copy_on_write", "the last block instead of the written one")
def copy_the_last_block(tables, ref_count, free, seq, position, block_size):
    block = tables[seq][-1]
    if ref_count[block] == 1:
        return None
    target = free.pop(0)
    ref_count[block] -= 1
    ref_count[target] = 1
    tables[seq][-1] = target
    return block, target


@wrong("kv_cache.copy_on_write", "the first block instead of the written one", ("usually means",))
def copy_the_first_shared_block(tables, ref_count, free, seq, position, block_size):
    for i, block in enumerate(tables[seq]):
        if ref_count[block] > 1:
            target = tables[seq][i] = free.pop(0)
            ref_count[block] -= 1
            ref_count[target] = 1
            return block, target
    return None


@wrong("kv_cache.copy_on_write")
def the_copy_has_as_many_users(tables, ref_count, free, seq, position, block_size):
    i = position // block_size
    old = tables[seq][i]
    if ref_count[old] > 1:
        new = free.pop(0)
        ref_count[new] = ref_count[old]
        ref_count[old] -= 1
        tables[seq][i] = new
        return old, new
    return None


@wrong("kv_cache.copy_on_write")
def everything_from_there_on(tables, ref_count, free, seq, position, block_size):
    first = position // block_size
    copied = None
    for i in range(first, len(tables[seq])):
        old = tables[seq][i]
        if ref_count[old] > 1:
            new = free.pop(0)
            ref_count[old] -= 1
            ref_count[new] = 1
            tables[seq][i] = new
            copied = copied or (old, new)
    return copied


@wrong("kv_cache.copy_on_write")
def target_and_source(tables, ref_count, free, seq, position, block_size):
    i = position // block_size
    old = tables[seq][i]
    if ref_count[old] < 2:
        return None
    tables[seq][i] = free.pop(0)
    ref_count[old] -= 1
    ref_count[tables[seq][i]] = 1
    return tables[seq][i], old


@wrong("kv_cache.block_hashes")
def the_whole_prefix_hashed_anew(tokens, block_size):
    full = len(tokens) // block_size
    return [combine(0, tuple(tokens[: (i + 1) * block_size])) for i in range(full)]


@wrong("kv_cache.block_hashes")
def the_blocks_number_as_parent(tokens, block_size):
    full = len(tokens) // block_size
    return [combine(i, tuple(tokens[i * block_size : (i + 1) * block_size])) for i in range(full)]


@wrong("kv_cache.block_hashes")
def only_the_block_before_counts(tokens, block_size):
    blocks = [tuple(tokens[i : i + block_size]) for i in range(0, len(tokens), block_size)]
    blocks = [b for b in blocks if len(b) == block_size]
    alone = [0, *(combine(0, b) for b in blocks)]
    return [combine(parent, b) for parent, b in zip(alone, blocks)]


@wrong("kv_cache.block_hashes")
def a_hash_for_every_token(tokens, block_size):
    parent, out = 0, []
    for i, token in enumerate(tokens):
        parent = combine(parent, (token,))
        if (i + 1) % block_size == 0:
            out.append(parent)
    return out


@wrong("kv_cache.prefix_hit", "going on after a miss")
def every_known_block(hashes, known, num_tokens, block_size):
    hits = len([h for h in hashes if h in known])
    return min(hits, (num_tokens - 1) // block_size) * block_size


@wrong("kv_cache.prefix_hit")
def all_or_nothing(hashes, known, num_tokens, block_size):
    usable = hashes[: (num_tokens - 1) // block_size]
    return len(usable) * block_size if all(h in known for h in usable) else 0


@wrong("kv_cache.prefix_hit")
def a_known_prompt_starts_anew(hashes, known, num_tokens, block_size):
    hits = 0
    while hits < len(hashes) and hashes[hits] in known:
        hits += 1
    return 0 if hits * block_size == num_tokens else hits * block_size


@wrong("kv_cache.prefix_hit")
def what_is_left_to_compute(hashes, known, num_tokens, block_size):
    hits = 0
    while hits < min(len(hashes), (num_tokens - 1) // block_size) and hashes[hits] in known:
        hits += 1
    return num_tokens - hits * block_size


@wrong("kv_cache.eviction")
class TheSmallestNumberFirst:
    def __init__(self, blocks):
        self.queue = list(blocks)

    def release(self, block_table):
        self.queue += block_table[::-1]

    def take(self):
        block = min(self.queue)
        self.queue.remove(block)
        return block

    def hit(self, block):
        self.queue.remove(block)


@wrong("kv_cache.eviction")
class AHitIsTheLatestUse:
    def __init__(self, blocks):
        self.queue = list(blocks)

    def release(self, block_table):
        self.queue += block_table[::-1]

    def take(self):
        return self.queue.pop(0)

    def hit(self, block):
        self.queue.remove(block)
        self.queue.append(block)


@wrong("kv_cache.eviction")
class OnlyTheTailMayGo:
    def __init__(self, blocks):
        self.queue = list(blocks)

    def release(self, block_table):
        self.queue.append(block_table[-1])

    def take(self):
        return self.queue.pop(0)

    def hit(self, block):
        self.queue = [b for b in self.queue if b != block]


@wrong("kv_cache.eviction")
class AHitUsesWhatCameBefore:
    def __init__(self, blocks):
        self.queue = list(blocks)

    def release(self, block_table):
        self.queue += block_table[::-1]

    def take(self):
        return self.queue.pop(0)

    def hit(self, block):
        self.queue = self.queue[self.queue.index(block) + 1 :]


def _heads(cache, block_table, length, group):
    rows = cache[block_table].reshape(-1, *cache.shape[2:])[:length]
    return rows.repeat_interleave(group, 1)


@wrong("kv_cache.paged_attention")
def garbage_keys_set_to_zero(q, k_cache, v_cache, block_table, length):
    group = len(q) // k_cache.shape[2]
    slots = len(block_table) * k_cache.shape[1]
    k, v = (_heads(c, block_table, slots, group).clone() for c in (k_cache, v_cache))
    k[length:], v[length:] = 0, 0
    w = (torch.einsum("hd,lhd->hl", q, k) / q.shape[1] ** 0.5).softmax(1)
    return torch.einsum("hl,lhd->hd", w, v)


@wrong("kv_cache.paged_attention")
def full_blocks_only(q, k_cache, v_cache, block_table, length):
    group = len(q) // k_cache.shape[2]
    kept = max(length // k_cache.shape[1] * k_cache.shape[1], 1)
    k, v = (_heads(c, block_table, kept, group) for c in (k_cache, v_cache))
    w = (torch.einsum("hd,lhd->hl", q, k) / q.shape[1] ** 0.5).softmax(1)
    return torch.einsum("hl,lhd->hd", w, v)


@wrong("kv_cache.paged_attention")
def a_softmax_for_each_block(q, k_cache, v_cache, block_table, length):
    group, size = len(q) // k_cache.shape[2], k_cache.shape[1]
    outs = []
    for i, block in enumerate(block_table):
        n = min(size, length - i * size)
        if n > 0:
            k, v = (c[block, :n].repeat_interleave(group, 1) for c in (k_cache, v_cache))
            w = (torch.einsum("hd,lhd->hl", q, k) / q.shape[1] ** 0.5).softmax(1)
            outs.append(torch.einsum("hl,lhd->hd", w, v))
    return torch.stack(outs).mean(0)


@wrong("kv_cache.paged_attention")
def heads_in_front_by_a_new_shape(q, k_cache, v_cache, block_table, length):
    group = len(q) // k_cache.shape[2]
    k, v = (c[block_table].reshape(k_cache.shape[2], -1, q.shape[1])[:, :length] for c in (k_cache, v_cache))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    w = (torch.einsum("hd,hld->hl", q, k) / q.shape[1] ** 0.5).softmax(1)
    return torch.einsum("hl,hld->hd", w, v)


class _Store:
    def __init__(self, free, block_size, kv_heads, dim):
        self.free, self.block_size = free, block_size
        self.k = torch.zeros(max(free) + 1, block_size, kv_heads, dim)
        self.v = torch.zeros_like(self.k)
        self.block_table = []
        self.length = 0

    def gather(self):
        k = self.k[self.block_table].flatten(0, 1)[: self.length].transpose(0, 1)
        return k, self.v[self.block_table].flatten(0, 1)[: self.length].transpose(0, 1)


@wrong("kv_cache.in_the_model")
class ANewBlockAsSoonAsOneIsFull(_Store):
    def append(self, k, v):
        if not self.block_table:
            self.block_table.append(self.free.pop(0))
        for i in range(k.shape[1]):
            block, offset = self.block_table[-1], self.length % self.block_size
            self.k[block, offset], self.v[block, offset] = k[:, i], v[:, i]
            self.length += 1
            if self.length % self.block_size == 0:
                self.block_table.append(self.free.pop(0))


@wrong("kv_cache.in_the_model")
class TheLastFreeBlock(_Store):
    def append(self, k, v):
        for i in range(k.shape[1]):
            offset = self.length % self.block_size
            if offset == 0:
                self.block_table.append(self.free.pop())
            self.k[self.block_table[-1], offset], self.v[self.block_table[-1], offset] = k[:, i], v[:, i]
            self.length += 1


@wrong("kv_cache.in_the_model")
class ReservedForTheWholeText(_Store):
    def append(self, k, v):
        if not self.block_table:
            self.block_table = [self.free.pop(0) for _ in range(8)]
        for i in range(k.shape[1]):
            block, offset = self.block_table[self.length // self.block_size], self.length % self.block_size
            self.k[block, offset], self.v[block, offset] = k[:, i], v[:, i]
            self.length += 1


@wrong("kv_cache.in_the_model")
class OffsetsCountedFromTheCall(_Store):
    def append(self, k, v):
        for i in range(k.shape[1]):
            if self.length % self.block_size == 0:
                self.block_table.append(self.free.pop(0))
            block, offset = self.block_table[-1], i % self.block_size
            self.k[block, offset], self.v[block, offset] = k[:, i], v[:, i]
            self.length += 1


@wrong("kv_cache.layer_kinds")
def half_a_window_on_average(layers, length, window, per_token, state):
    size = {"full": length * per_token, "sliding": min(length, window // 2) * per_token, "linear": state}
    return sum(size[kind] for kind in layers)


@wrong("kv_cache.layer_kinds")
def the_token_itself_besides_its_window(layers, length, window, per_token, state):
    size = {"full": length * per_token, "sliding": min(length, window + 1) * per_token, "linear": state}
    return sum(size[kind] for kind in layers)


@wrong("kv_cache.layer_kinds")
def one_state_for_the_model(layers, length, window, per_token, state):
    tokens = sum(length if kind == "full" else min(length, window) for kind in layers if kind != "linear")
    return tokens * per_token + (state if "linear" in layers else 0)


@wrong("kv_cache.layer_kinds")
def blocks_of_sixteen(layers, length, window, per_token, state):
    def whole(n):
        return -(-n // 16) * 16

    size = {"full": whole(length) * per_token, "sliding": whole(min(length, window)) * per_token, "linear": state}
    return sum(size[kind] for kind in layers)


@wrong("kv_cache.absorb")
def the_matrix_not_transposed(q, latent, w_k):
    return torch.stack([(w_k[h] @ q[h]) @ latent.T for h in range(len(q))])


@wrong("kv_cache.absorb")
def weights_instead_of_scores(q, latent, w_k):
    keys = torch.einsum("hdr,tr->htd", w_k, latent)
    return torch.einsum("hd,htd->ht", q, keys).softmax(-1)


@wrong("kv_cache.absorb")
def tokens_by_heads(q, latent, w_k):
    return latent @ torch.einsum("hd,hdr->rh", q, w_k)


@wrong("kv_cache.absorb")
def a_query_for_all_heads(q, latent, w_k):
    return torch.einsum("d,hdr,tr->ht", q.mean(0), w_k, latent)
