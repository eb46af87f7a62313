"""Readers of lesson 3."""

import math

import torch

from optinfer.course.exercises.kernels import tl, triton
from tests.course.readers import wrong


@wrong("attention.stable_softmax")
def minus_the_mean(scores):
    seen = torch.where(scores.isinf(), 0.0, scores)
    e = torch.exp(scores - seen.mean(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True).clamp(min=1e-38)


@wrong("attention.stable_softmax")
def cut_off_where_exp_ends(scores):
    e = torch.exp(scores.clamp(max=80))
    return e / e.sum(-1, keepdim=True).clamp(min=1e-38)


@wrong("attention.stable_softmax")
def masked_is_a_large_negative_number(scores):
    scores = scores.clamp(min=-1e9)
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


@wrong("attention.stable_softmax")
def masked_scores_are_zero(scores):
    scores = torch.nan_to_num(scores, neginf=0.0)
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


@wrong("attention.causal_mask")
def one_token_ahead(q_len, kv_len):
    return torch.ones(q_len, kv_len).tril(kv_len - q_len + 1).bool()


@wrong("attention.causal_mask")
def keys_by_queries(q_len, kv_len):
    return (torch.arange(kv_len)[:, None] <= torch.arange(q_len) + kv_len - q_len).bool()


@wrong("attention.causal_mask")
def what_is_added_to_scores(q_len, kv_len):
    hidden = torch.ones(q_len, kv_len).triu(kv_len - q_len + 1).bool()
    return torch.zeros(q_len, kv_len).masked_fill(hidden, -math.inf)


@wrong("attention.causal_mask")
def never_more_queries_than_keys(q_len, kv_len):
    old = max(kv_len - q_len, 0)
    return torch.cat([torch.ones(q_len, old), torch.ones(q_len, kv_len - old).tril()], 1).bool()


@wrong("attention.grouped_heads")
def the_groups_queries_averaged(q, k, v):
    q = q.view(len(k), -1, *q.shape[1:]).mean(1)
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@wrong("attention.grouped_heads")
def scaled_by_the_number_of_heads(q, k, v):
    k = k.repeat_interleave(len(q) // len(k), 0)
    v = v.repeat_interleave(len(q) // len(v), 0)
    return (q @ k.transpose(1, 2) / len(q) ** 0.5).softmax(-1) @ v


@wrong("attention.grouped_heads")
def scaled_behind_the_softmax(q, k, v):
    k = k.repeat_interleave(len(q) // len(k), 0)
    v = v.repeat_interleave(len(q) // len(v), 0)
    return (q @ k.transpose(1, 2)).softmax(-1) / q.shape[-1] ** 0.5 @ v


@wrong("attention.grouped_heads")
def only_the_keys_are_shared(q, k, v):
    group = len(q) // len(k)
    heads = [(q[h] @ k[h // group].T / q.shape[-1] ** 0.5).softmax(-1) @ v[h % len(v)] for h in range(len(q))]
    return torch.stack(heads)


def _seen(m):
    return torch.where(m.isinf(), 0.0, m)


@wrong("attention.online_step")
def an_average_from_the_start(m, l, o, scores, v):
    new = torch.maximum(m, scores.max(1).values)
    w, c = torch.exp(scores - _seen(new)[:, None]), torch.exp(m - _seen(new))
    total = l * c + w.sum(1)
    return new, total, (o * (l * c)[:, None] + w @ v) / total.clamp(min=1e-38)[:, None]


@wrong("attention.online_step")
def each_block_by_its_own_maximum(m, l, o, scores, v):
    mine = scores.max(1).values
    w = torch.exp(scores - _seen(mine)[:, None])
    new = torch.maximum(m, mine)
    c = torch.exp(m - _seen(new))
    return new, l * c + w.sum(1), o * c[:, None] + w @ v


@wrong("attention.online_step")
def the_new_block_shrinks_too(m, l, o, scores, v):
    new = torch.maximum(m, scores.max(1).values)
    w, c = torch.exp(scores - _seen(new)[:, None]), torch.exp(m - _seen(new))
    return new, (l + w.sum(1)) * c, (o + w @ v) * c[:, None]


@wrong("attention.online_step")
def the_sum_of_the_scores(m, l, o, scores, v):
    new = torch.maximum(m, scores.max(1).values)
    w, c = torch.exp(scores - _seen(new)[:, None]), torch.exp(m - _seen(new))
    return new, l * c + scores.clamp(min=0).sum(1), o * c[:, None] + w @ v


@wrong("attention.merge_partials", "one maximum for all rows")
def one_maximum_of_all(outs, lses):
    weights = torch.exp(lses - lses[lses.isfinite()].max())
    total = weights.sum(0)
    return (weights[..., None] * outs).sum(0) / torch.where(total == 0, 1.0, total)[:, None]


@wrong("attention.merge_partials")
def the_strongest_part_alone(outs, lses):
    best = lses.argmax(0)
    rows = torch.arange(outs.shape[1])
    return torch.where(lses.max(0).values.isinf()[:, None], 0.0, outs[best, rows])


@wrong("attention.merge_partials")
def weights_over_the_rows(outs, lses):
    w = torch.exp(lses - _seen(lses.max(1, keepdim=True).values))
    w = w / w.sum(1, keepdim=True).clamp(min=1e-38)
    return (w[..., None] * outs).sum(0)


@wrong("attention.merge_partials")
def two_at_a_time_half_and_half(outs, lses):
    out, lse = outs[0], lses[0]
    for other, mine in zip(outs[1:], lses[1:]):
        top = torch.maximum(lse, mine)
        a, b = torch.exp(lse - _seen(top)), torch.exp(mine - _seen(top))
        out = (a[:, None] * out + b[:, None] * other) / (a + b).clamp(min=1e-38)[:, None]
        lse = top
    return out


@wrong("attention.tiled")
def a_softmax_for_each_block(q, k, v, block):
    out, count = torch.zeros_like(q), torch.zeros(len(q), 1)
    for start in range(0, len(q), block):
        s = q @ k[start : start + block].T / q.shape[1] ** 0.5
        hidden = torch.arange(start, start + s.shape[1]) > torch.arange(len(q))[:, None]
        s = s.masked_fill(hidden, -math.inf)
        e = torch.exp(s - _seen(s.max(1, keepdim=True).values))
        total = e.sum(1, keepdim=True)
        out += e / total.clamp(min=1e-38) @ v[start : start + block]
        count += total > 0
    return out / count


@wrong("attention.tiled")
def no_maximum_at_all(q, k, v, block):
    top, total = torch.zeros_like(q), torch.zeros(len(q), 1)
    for start in range(0, len(q), block):
        s = q @ k[start : start + block].T / q.shape[1] ** 0.5
        hidden = torch.arange(start, start + s.shape[1]) > torch.arange(len(q))[:, None]
        e = torch.exp(s.masked_fill(hidden, -math.inf))
        top, total = top + e @ v[start : start + block], total + e.sum(1, keepdim=True)
    return top / total


@wrong("attention.tiled")
def whole_blocks_of_the_past(q, k, v, block):
    m, l, o = torch.full((len(q),), -math.inf), torch.zeros(len(q)), torch.zeros_like(q)
    for start in range(0, len(q), block):
        s = q @ k[start : start + block].T / q.shape[1] ** 0.5
        hidden = torch.arange(len(q)) < start
        s = s.masked_fill(hidden[:, None], -math.inf)
        new = torch.maximum(m, s.max(1).values)
        e, c = torch.exp(s - _seen(new)[:, None]), torch.exp(m - _seen(new))
        m, l, o = new, l * c + e.sum(1), o * c[:, None] + e @ v[start : start + block]
    return o / l[:, None]


@wrong("attention.tiled")
def the_short_block_left_out(q, k, v, block):
    out = torch.zeros_like(q)
    for i in range(len(q)):
        s, end = [], 0
        for start in range(0, i + 1, block):
            end = min(start + block, i + 1)
            s.append(k[start:end] @ q[i] / q.shape[1] ** 0.5)
        kept = s[:-1] if len(s) > 1 and len(s[-1]) < block else s
        e = torch.exp(torch.cat(kept) - torch.cat(kept).max())
        out[i] = e / e.sum() @ v[: len(e)]
    return out


@wrong("attention.traffic", "written but never read back")
def a_matrix_moved_once(length, dim, itemsize):
    return (2 * length**2 + 4 * length * dim) * itemsize, 4 * length * dim * itemsize


@wrong("attention.traffic")
def keys_and_values_for_every_query(length, dim, itemsize):
    vectors = length * dim
    return (4 * length**2 + 4 * vectors) * itemsize, (2 * vectors + 2 * length * vectors) * itemsize


@wrong("attention.traffic")
def scores_in_fp32(length, dim, itemsize):
    vectors = length * dim * itemsize
    return 4 * length**2 * 4 + 4 * vectors, 4 * vectors


@wrong("attention.traffic")
def half_of_the_matrix_is_masked(length, dim, itemsize):
    vectors = length * dim
    return (4 * (length * (length + 1) // 2) + 4 * vectors) * itemsize, 4 * vectors * itemsize


@wrong("attention.triton_softmax")
@triton.jit
def never_divided(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + i, mask=i < columns, other=-float("inf"))
    tl.store(out_ptr + row * columns + i, tl.exp(x - tl.max(x, axis=0)), mask=i < columns)


@wrong("attention.triton_softmax")
@triton.jit
def columns_instead_of_rows(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    column = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * columns + column, mask=i < columns, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + i * columns + column, e / tl.sum(e, axis=0), mask=i < columns)


@wrong("attention.triton_softmax")
@triton.jit
def the_neighbors_numbers_read(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    start = tl.program_id(0) * columns
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + i)
    x = tl.where(i < columns, x, -float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + start + i, e / tl.sum(e, axis=0), mask=i < columns)


@wrong("attention.triton_softmax", "the maximum taken with zeros in the missing places")
@triton.jit
def the_maximum_is_at_least_zero(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    start = tl.program_id(0) * columns
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + i, mask=i < columns, other=0.0)
    e = tl.where(i < columns, tl.exp(x - tl.max(x, axis=0)), 0.0)
    tl.store(out_ptr + start + i, e / tl.sum(e, axis=0), mask=i < columns)


@wrong("attention.triton_flash")
@triton.jit
def the_largest_score_starts_at_zero(
    q_ptr, k_ptr, v_ptr, out_ptr, length, scale, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    q = tl.load(q_ptr + rows[:, None] * DIM + d[None, :], mask=rows[:, None] < length, other=0.0)
    m, l, o = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(0, length, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + n[:, None] * DIM + d[None, :], mask=n[:, None] < length, other=0.0)
        v = tl.load(v_ptr + n[:, None] * DIM + d[None, :], mask=n[:, None] < length, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(n[None, :] <= rows[:, None], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        w, c = tl.exp(s - new[:, None]), tl.exp(m - new)
        l = l * c + tl.sum(w, axis=1)
        o = o * c[:, None] + tl.dot(w, v, input_precision="ieee")
        m = new
    tl.store(out_ptr + rows[:, None] * DIM + d[None, :], o / l[:, None], mask=rows[:, None] < length)


@wrong("attention.triton_flash")
@triton.jit
def divided_in_every_tile(
    q_ptr, k_ptr, v_ptr, out_ptr, length, scale, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    q = tl.load(q_ptr + rows[:, None] * DIM + d[None, :], mask=rows[:, None] < length, other=0.0)
    m, l = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(0, length, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + n[:, None] * DIM + d[None, :], mask=n[:, None] < length, other=0.0)
        v = tl.load(v_ptr + n[:, None] * DIM + d[None, :], mask=n[:, None] < length, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(n[None, :] <= rows[:, None], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        w, c = tl.exp(s - new[:, None]), tl.exp(m - new)
        l = l * c + tl.sum(w, axis=1)
        o = (o * c[:, None] + tl.dot(w, v, input_precision="ieee")) / l[:, None]
        m = new
    tl.store(out_ptr + rows[:, None] * DIM + d[None, :], o, mask=rows[:, None] < length)


@wrong("attention.triton_flash", "the tiles before the diagonal left out")
@triton.jit
def the_tile_of_the_diagonal_alone(
    q_ptr, k_ptr, v_ptr, out_ptr, length, scale, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    q = tl.load(q_ptr + rows[:, None] * DIM + d[None, :], mask=rows[:, None] < length, other=0.0)
    k = tl.load(k_ptr + rows[:, None] * DIM + d[None, :], mask=rows[:, None] < length, other=0.0)
    v = tl.load(v_ptr + rows[:, None] * DIM + d[None, :], mask=rows[:, None] < length, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(rows[None, :] <= rows[:, None], s, -float("inf"))
    w = tl.exp(s - tl.max(s, axis=1)[:, None])
    o = tl.dot(w, v, input_precision="ieee") / tl.sum(w, axis=1)[:, None]
    tl.store(out_ptr + rows[:, None] * DIM + d[None, :], o, mask=rows[:, None] < length)


@wrong("attention.in_the_model")
def hidden_scores_are_zero(q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, t = q.shape[2], k.shape[2]
    visible = torch.ones(n, t).tril(t - n)
    return ((q @ k.transpose(-1, -2)) * scale * visible).softmax(-1) @ v


@wrong("attention.in_the_model")
def weights_cut_after_the_softmax(q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, t = q.shape[2], k.shape[2]
    return ((q @ k.transpose(-1, -2)) * scale).softmax(-1).tril(t - n) @ v


@wrong("attention.in_the_model")
def a_mask_for_the_prompt_only(q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, t = q.shape[2], k.shape[2]
    s = q @ k.transpose(-1, -2) * scale
    if n == t:
        s = s.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    return s.softmax(-1) @ v


@wrong("attention.in_the_model")
def a_batch_of_one(q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    k, v = k[0].repeat_interleave(group, 0), v[0].repeat_interleave(group, 0)
    n, t = q.shape[2], k.shape[1]
    s = (q[0] @ k.transpose(1, 2) * scale).masked_fill(torch.ones(n, t).triu(t - n + 1).bool(), -math.inf)
    return (s.softmax(-1) @ v)[None]


def _attentions(*sizes):
    return [dict(zip(("q_len", "kv_len", "kv_heads", "group", "causal", "scores"), size)) for size in sizes]


@wrong("attention.flash_inputs", "only whole tiles")
def powers_of_two():
    return _attentions((16, 16, 1, 1, True, 0), (16, 32, 2, 2, False, 0), (32, 32, 2, 1, True, -128))


@wrong("attention.flash_inputs")
def a_prompt_and_a_step_of_a_model():
    return _attentions((17, 17, 1, 2, True, 0), (1, 18, 1, 2, True, 0))


@wrong("attention.flash_inputs", "one head of keys")
def one_head_will_do():
    return _attentions((17, 33, 1, 1, True, 0), (20, 41, 1, 1, False, -200), (7, 7, 1, 1, True, 200))


@wrong("attention.flash_inputs", "only prompts")
def only_whole_sequences():
    return _attentions((5, 5, 2, 2, True, 0), (20, 20, 1, 1, False, -200), (17, 17, 1, 1, True, 50))


@wrong("attention.flash_inputs")
def large_scores_are_large():
    return _attentions((3, 17, 2, 2, True, 200), (20, 27, 1, 1, False, 100))


@wrong("attention.flash_inputs")
def more_queries_than_keys():
    return _attentions((3, 2, 2, 2, True, 0), (20, 20, 1, 1, False, -200))
