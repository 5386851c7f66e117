"""Attention of a verify pass: a few queries a row against a slot of keys and values, rows of different lengths.

Query i of row r lies at slot starts[r] + i and sees the slots up to its own. Bytes, with b bytes a number, D of a head
and H_kv heads of keys: 2 D b H_kv (starts[r] + counts[r]) a row for its keys and values, each read once for all queries
of its group (with a window no more than the slices of 256 keys that it reaches); queries and output; and 4 (D + 2) a
query and slice, queries of a group counted up to the next power of two from 16 on, written and read between the two
launches.
"""

import torch
import triton
import triton.language as tl

# Keys that a program goes through, and of those how many at a time.
SLICE, TILE = 256, 64


@triton.jit
def _split_kv_kernel(
    query, key, value, starts, counts, acc_parts, m_parts, l_parts,
    query_row_stride, query_head_stride, query_stride,
    key_row_stride, key_head_stride, key_stride,
    value_row_stride, value_head_stride, value_stride,
    queries, groups, slices, scale, window,
    WINDOW: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
    SLICE: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What the queries of a group make of a slice of the context, unnormalised.

    WIDEN: products in float32 whatever the dtype, as Triton's interpreter knows none of bfloat16.
    acc_parts: [R, H_kv, slices, QUERIES, D], m_parts, l_parts: [R, H_kv, slices, QUERIES].
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = tl.load(starts + row), tl.load(counts + row)
    end = start + count
    first = part * SLICE
    offs_m = tl.arange(0, QUERIES)
    group, place = offs_m // queries, offs_m % queries
    offs_out = ((row * tl.num_programs(1) + head).to(tl.int64) * slices + part) * QUERIES + offs_m
    # Slices that nobody of the row sees say so to the second launch, and read nothing.
    unseen = (first >= end) | (count == 0)
    if WINDOW:
        unseen = unseen | (first + SLICE <= start - window + 1)
    if unseen:
        tl.store(m_parts + offs_out, tl.full((QUERIES,), float("-inf"), tl.float32))
        return
    mask_m = (group < groups) & (place < count)
    offs_d = tl.arange(0, DIM)
    mask_d = (offs_d < WIDTH)[None, :]
    q_ptrs = query + row.to(tl.int64) * query_row_stride + (head * groups + group)[:, None] * query_head_stride
    q = tl.load(q_ptrs + place[:, None] * query_stride + offs_d[None, :], mask_m[:, None] & mask_d, 0.0)
    if WIDEN:
        q = q.to(tl.float32)
    slot = start + place
    m = tl.full((QUERIES,), float("-inf"), tl.float32)
    l_sum = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIM), tl.float32)
    k_ptrs = key + row.to(tl.int64) * key_row_stride + head.to(tl.int64) * key_head_stride
    v_ptrs = value + row.to(tl.int64) * value_row_stride + head.to(tl.int64) * value_head_stride
    for begin in range(first, tl.minimum(first + SLICE, end), TILE):
        offs_n = begin + tl.arange(0, TILE)
        mask_n = (offs_n < end)[:, None] & mask_d
        k = tl.load(k_ptrs + offs_n.to(tl.int64)[:, None] * key_stride + offs_d[None, :], mask_n, 0.0)
        v = tl.load(v_ptrs + offs_n.to(tl.int64)[:, None] * value_stride + offs_d[None, :], mask_n, 0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        sees = mask_m[:, None] & (offs_n[None, :] <= slot[:, None])
        if WINDOW:
            sees = sees & (offs_n[None, :] > slot[:, None] - window)
        scores = tl.where(sees, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp(scores - m_safe[:, None])
        alpha = tl.exp(m - m_safe)
        l_sum = l_sum * alpha + tl.sum(p, 1)
        pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        acc = acc * alpha[:, None] + pv
        m = m_new
    tl.store(m_parts + offs_out, m)
    tl.store(l_parts + offs_out, l_sum)
    tl.store(acc_parts + offs_out[:, None] * WIDTH + offs_d[None, :], acc, mask_d)


@triton.jit
def _combine_kernel(
    acc_parts, m_parts, l_parts, sinks, output,
    output_row_stride, output_stride, output_head_stride,
    queries, groups, slices,
    SINKS: tl.constexpr, QUERIES: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Output [R, n, H, D] of one query of one head from all slices; zeros for queries that are not there."""
    row, head, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = (head % groups) * queries + place
    offs_s, offs_d = tl.arange(0, SLICES), tl.arange(0, DIM)
    offs = ((row * (tl.num_programs(1) // groups) + head // groups).to(tl.int64) * slices + offs_s) * QUERIES + offs_m
    m = tl.load(m_parts + offs, offs_s < slices, float("-inf"))
    mask_s = m > float("-inf")
    m_max = tl.max(m, 0)
    nothing = m_max == float("-inf")
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        m_max = tl.maximum(m_max, sink)
    m_safe = tl.where(m_max == float("-inf"), 0.0, m_max)
    alpha = tl.where(mask_s, tl.exp(m - m_safe), 0.0)
    l_sum = tl.sum(tl.load(l_parts + offs, mask_s, 0.0) * alpha, 0)
    if SINKS:
        l_sum += tl.exp(sink - m_safe)
    mask_d = (offs_d < WIDTH)[None, :]
    acc = tl.load(acc_parts + offs[:, None] * WIDTH + offs_d[None, :], mask_s[:, None] & mask_d, 0.0)
    out = tl.sum(acc * alpha[:, None], 0) / tl.where(nothing, 1.0, l_sum)
    out_ptrs = output + row.to(tl.int64) * output_row_stride + place * output_stride + head * output_head_stride
    tl.store(out_ptrs + offs_d, out.to(output.dtype.element_ty), offs_d < WIDTH)


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `dspark_kernels.ragged_attention`. Two launches."""
    rows, heads, queries, width = query.shape
    kv_heads, view = key.shape[1], key.shape[2]
    groups, slices = heads // kv_heads, max(1, triton.cdiv(view, SLICE))
    block, dim = max(16, triton.next_power_of_2(groups * queries)), max(16, triton.next_power_of_2(width))
    output = torch.empty(rows, queries, heads, width, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    m_parts, l_parts = (query.new_empty(rows, kv_heads, slices, block, dtype=torch.float32) for _ in range(2))
    acc_parts = query.new_empty(rows, kv_heads, slices, block, width, dtype=torch.float32)
    _split_kv_kernel[rows, kv_heads, slices](
        query, key, value, starts.contiguous(), counts.contiguous(), acc_parts, m_parts, l_parts,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, groups, slices, scale, window or 0,
        WINDOW=window is not None, QUERIES=block, WIDTH=width, DIM=dim, SLICE=SLICE, TILE=TILE, WIDEN=not query.is_cuda,
    )  # fmt: skip
    _combine_kernel[rows, heads, queries](
        acc_parts, m_parts, l_parts, m_parts if sinks is None else sinks, output, *output.stride()[:3],
        queries, groups, slices,
        SINKS=sinks is not None, QUERIES=block, SLICES=triton.next_power_of_2(slices), WIDTH=width, DIM=dim,
    )  # fmt: skip
    return output
