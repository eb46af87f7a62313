"""Attention over a paged KV cache: for decoding, for prompts in chunks, and for both in one call.

The queries of all sequences lie in a row; sequence b owns the rows from `query_starts[b]` to `query_starts[b + 1]`, and
they are the last ones of its context. In decoding, one query per sequence reads that sequence's whole cache: all memory
traffic, hardly any arithmetic. So the kernel is organized around reading every key and value exactly once, by enough programs to
keep the whole GPU busy even for one sequence:

- the query heads that share a KV head (grouped-query attention) are rows of *one* tile, so a key is read once
  for all of them;
- a long context is cut into splits, one program each (Flash-Decoding); a second kernel adds the parts up;
- every token looks its page up by itself, so the page size and the tile size are free of each other;
- int8 keys and values go into the product as they are. Their scale is per token, hence a factor of a whole
  column of scores: applied to the scores, and to the probabilities, never to a tile of keys or values.

A chunk of a prompt is the same with more rows: row r is query r // group, head r % group. Programs whose rows a short
sequence does not have end at once.

Sources: PagedAttention (Kwon et al. 2023), Flash-Decoding (Dao et al. 2023), and the online softmax of
`flash_attention`, which this file imports.
"""

import torch

from optinfer_kernels import require_triton
from optinfer_kernels.paged_arguments import PagedArguments, check_paged_attention

triton = require_triton()

import triton.language as tl  # noqa: E402

from optinfer_kernels.flash_attention import LOG2E, Tile, block_d, online_softmax_step, stages_for, tanh  # noqa: E402
from optinfer_kernels.interpreter import device_shape, launch  # noqa: E402


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, sink_ptr, tree_ptr, table_ptr, length_ptr, start_ptr,
    out_ptr, part_ptr, lse_ptr,
    q_stride_n, q_stride_h, out_stride_n, out_stride_h, page_stride, slot_stride, head_stride, table_stride,
    tokens, splits, scale, cap_scale, window, tree_width,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Grid (splits * row blocks, KV heads, batch). `scale` includes log2(e); with SOFTCAP it is the cap's, and `cap_scale`
    brings the scores into units of the cap.

    Without SPLIT, writes `out`. With it, writes each split's own softmax average to `part` and its log2-sum-exp
    to `lse`, both laid out [kv_heads, splits, tokens * GROUP].
    """
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + batch)
    first = tl.load(start_ptr + batch).to(tl.int64)
    q_len = (tl.load(start_ptr + batch + 1) - first).to(tl.int32)
    first_row = tl.program_id(0) // splits * BLOCK_M
    if first_row >= q_len * GROUP:
        return

    # Rows of the tile: (query, head of the group) pairs, all reading this KV head.
    rows = first_row + tl.arange(0, BLOCK_M)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < q_len * GROUP) & (dims[None, :] < HEAD_DIM)
    q_pointers = q_ptr + (first + query)[:, None] * q_stride_n + head[:, None] * q_stride_h
    q = tl.load(q_pointers + dims[None, :], mask=inside, other=0.0)

    # What these rows can see, and this program's share of it, in whole tiles.
    last_seen = query + length - q_len  # the last query stands at the end of the context
    seen_end = tl.minimum(length, (first_row + BLOCK_M - 1) // GROUP + 1 + length - q_len)
    seen_begin = 0
    if WINDOW:
        seen_begin = tl.maximum(0, first_row // GROUP + length - q_len + 1 - window) // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.cdiv(seen_end - seen_begin, splits), BLOCK_N) * BLOCK_N
    begin = seen_begin + split * per_split
    end = tl.minimum(seen_end, begin + per_split)

    m = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SINKS and split == 0:  # a key that everybody sees and whose value is zero: one split counts it
        m = tl.load(sink_ptr + head, mask=rows < q_len * GROUP, other=0.0) * 1.4426950408889634
        l = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < end
        page = tl.load(table_ptr + batch * table_stride + token // PAGE, mask=exists, other=0).to(tl.int64)
        row = page * page_stride + token % PAGE * slot_stride + kv_head * head_stride
        tile = exists[:, None] & (dims[None, :] < HEAD_DIM)
        k = tl.load(k_ptr + row[:, None] + dims[None, :], mask=tile, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if INT8:
            scale_row = (page * PAGE + token % PAGE) * tl.num_programs(1) + kv_head
            scores = scores * tl.load(k_scale_ptr + scale_row, mask=exists, other=0.0)[None, :]
        if SOFTCAP:
            scores = tanh(scores * cap_scale)
        visible = exists[None, :] & (token[None, :] <= last_seen[:, None])
        if WINDOW:
            visible &= token[None, :] > last_seen[:, None] - window
        if TREE:  # of this step's tokens, the mask's row says which; all older ones are seen
            place = token - (length - q_len)
            masked = visible & (place[None, :] >= 0) & (rows[:, None] < q_len * GROUP)
            seen = tl.load(tree_ptr + (first + query)[:, None] * tree_width + place[None, :], mask=masked, other=1)
            visible &= seen != 0
        scores = tl.where(visible, scores, -float("inf"))
        p, m, l, acc = online_softmax_step(scores, m, l, acc, scale)
        if INT8:
            p = p * tl.load(v_scale_ptr + scale_row, mask=exists, other=0.0)[None, :]
        v = tl.load(v_ptr + row[:, None] + dims[None, :], mask=tile, other=0.0)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)

    average = acc / tl.where(l > 0, l, 1.0)[:, None]
    if SPLIT:
        base = ((kv_head * splits + split) * tokens + first) * GROUP + rows
        tl.store(part_ptr + base[:, None] * HEAD_DIM + dims[None, :], average, mask=inside)
        lse = tl.where(l > 0, m + tl.math.log2(tl.where(l > 0, l, 1.0)), -float("inf"))
        tl.store(lse_ptr + base, lse, mask=rows < q_len * GROUP)
    else:
        out_pointers = out_ptr + (first + query)[:, None] * out_stride_n + head[:, None] * out_stride_h
        tl.store(out_pointers + dims[None, :], average.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_splits_kernel(
    part_ptr, lse_ptr, out_ptr, out_stride_n, out_stride_h, rows, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Average the splits of one row, each weighted with its share 2^lse of the softmax. Grid (rows, KV heads)."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    base = (kv_head * splits + split) * rows + row
    lse = tl.load(lse_ptr + base, mask=split < splits, other=-float("inf"))
    weight = tl.math.exp2(lse - tl.maximum(tl.max(lse, 0), -1.0e30))  # a split that saw nothing weighs 0
    tile = (split[:, None] < splits) & (dims[None, :] < HEAD_DIM)
    part = tl.load(part_ptr + base[:, None] * HEAD_DIM + dims[None, :], mask=tile, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    pointers = out_ptr + row // GROUP * out_stride_n + (kv_head * GROUP + row % GROUP) * out_stride_h + dims
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def tile_for(arch: int, dtype: torch.dtype, head_dim: int, rows: int) -> Tile:
    """Decoding has few rows and wants many loads in flight; a prompt chunk has many rows and wants large products."""
    wide = block_d(head_dim) > 128 or dtype == torch.float32
    block_m = 16 if rows <= 16 or arch < 80 else 32 if wide else 64
    if arch < 80:  # no asynchronous copies, and products on ordinary cores: no more rows than there are
        narrow = 2 if block_d(head_dim) >= 128 else 1
        rows = min(16, triton.next_power_of_2(rows))
        return Tile(rows, (64 if rows <= 4 else 32) // narrow, 4 if rows == 16 else 2, 1)
    stages = 2 if wide else 3
    return Tile(
        block_m, 32 if wide else 64, 4 if block_m == 16 else 8, stages_for(arch, stages) if block_m == 64 else stages
    )


def choose_splits(a: PagedArguments, tile: Tile, max_len: int, processors: int) -> int:
    """Enough programs for two per processor, but at least two tiles of keys for each; a power of two.

    Depends on shapes only, never on `context_lens`: no wait for the GPU, and the same launch in a CUDA graph.
    """
    programs = a.batch * a.kv_heads * triton.cdiv(a.max_queries * a.group, tile.block_m)
    most = min(triton.cdiv(max_len, 2 * tile.block_n), 2 * processors // programs)
    return 1 << max(0, most.bit_length() - 1)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float | None = None,
    *,
    query_starts: torch.Tensor | None = None,
    max_queries: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    splits: int | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Attention of the last queries of each sequence over its pages; returns q's shape.

    q [batch, heads, D], [batch, heads, q_len, D], or packed [tokens, heads, D] with query_starts int [batch + 1] (give
    max_queries too on a GPU: to look it up would stop the stream). k_cache, v_cache [num_blocks, block_size, kv_heads, D]
    in q's dtype (fp16, bf16, fp32), or int8 with float32 k_scale, v_scale [num_blocks, block_size, kv_heads].
    block_tables [batch, max_blocks] and context_lens [batch] (tokens of each sequence, the queries included) are int32 or
    int64. A query sees keys up to its own position, `window` of them at most; see `PagedArguments` for softcap, sinks and
    tree_mask.
    """
    a = check_paged_attention(
        q, k_cache, v_cache, block_tables, context_lens, scale, query_starts=query_starts, max_queries=max_queries,
        window=window, softcap=softcap, sinks=sinks, tree_mask=tree_mask, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    queries = a.q.contiguous()
    out = torch.empty_like(queries)
    tokens = queries.shape[0]
    arch, processors = device_shape(q.device)
    tile = tile or tile_for(arch, q.dtype, a.head_dim, a.max_queries * a.group)
    splits = splits or choose_splits(a, tile, block_tables.shape[1] * a.block_size, processors)
    part = lse = out
    if splits > 1:
        part = torch.empty((a.kv_heads, splits, tokens * a.group, a.head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((a.kv_heads, splits, tokens * a.group), dtype=torch.float32, device=q.device)
    launch(
        paged_attention_kernel,
        (splits * triton.cdiv(a.max_queries * a.group, tile.block_m), a.kv_heads, a.batch),
        queries, k_cache, v_cache,
        k_scale.contiguous() if a.int8 else lse, v_scale.contiguous() if a.int8 else lse,
        a.sinks if a.sinks is not None else lse,
        a.tree_mask.contiguous().view(torch.int8) if a.tree_mask is not None else lse,
        block_tables.contiguous(), context_lens.contiguous(), a.query_starts.contiguous(), out, part, lse,
        *queries.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3], block_tables.shape[1],
        tokens, splits, (a.softcap or a.scale) * LOG2E, a.scale / a.softcap if a.softcap else 0.0, a.window,
        a.max_queries if a.tree_mask is not None else 0,
        GROUP=a.group, HEAD_DIM=a.head_dim, BLOCK_D=block_d(a.head_dim), PAGE=a.block_size,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, INT8=a.int8, SPLIT=splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        WINDOW=a.window > 0, SOFTCAP=a.softcap > 0, SINKS=a.sinks is not None, TREE=a.tree_mask is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        launch(
            add_splits_kernel, (tokens * a.group, a.kv_heads), part, lse, out, *out.stride()[:2], tokens * a.group, splits,
            GROUP=a.group, HEAD_DIM=a.head_dim, BLOCK_D=block_d(a.head_dim), BLOCK_S=triton.next_power_of_2(splits),
            num_warps=max(1, min(4, splits * block_d(a.head_dim) // 2048)),  # at most 64 numbers a thread, no copies of them
        )  # fmt: skip
    return a.unpack(out)
