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
def _slice_kernel(
    query, key, value, starts, counts, mixed, tops, sums,
    query_row_stride, query_head_stride, query_stride,
    key_row_stride, key_head_stride, key_stride,
    value_row_stride, value_head_stride, value_stride,
    queries, groups, slices, scale, window,
    WINDOW: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
    SLICE: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What the queries of a group make of a slice of the context, unnormalised.

    WIDEN: products in float32 whatever the dtype, as Triton's interpreter knows none of bfloat16.
    mixed: [R, H_kv, slices, QUERIES, D], tops, sums: [R, H_kv, slices, QUERIES].
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = tl.load(starts + row), tl.load(counts + row)
    end = start + count
    first = part * SLICE
    m = tl.arange(0, QUERIES)
    group, place = m // queries, m % queries
    out = ((row * tl.num_programs(1) + head).to(tl.int64) * slices + part) * QUERIES + m
    # Slices that nobody of the row sees say so to the second launch, and read nothing.
    unseen = (first >= end) | (count == 0)
    if WINDOW:
        unseen = unseen | (first + SLICE <= start - window + 1)
    if unseen:
        tl.store(tops + out, tl.full((QUERIES,), float("-inf"), tl.float32))
        return
    real = (group < groups) & (place < count)
    i = tl.arange(0, DIM)
    across = (i < WIDTH)[None, :]
    from_ = query + row.to(tl.int64) * query_row_stride + (head * groups + group)[:, None] * query_head_stride
    q = tl.load(from_ + place[:, None] * query_stride + i[None, :], real[:, None] & across, 0.0)
    if WIDEN:
        q = q.to(tl.float32)
    slot = start + place
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sum_of_values = tl.zeros((QUERIES, DIM), tl.float32)
    keys = key + row.to(tl.int64) * key_row_stride + head.to(tl.int64) * key_head_stride
    values = value + row.to(tl.int64) * value_row_stride + head.to(tl.int64) * value_head_stride
    for begin in range(first, tl.minimum(first + SLICE, end), TILE):
        at = begin + tl.arange(0, TILE)
        stored = (at < end)[:, None] & across
        k = tl.load(keys + at.to(tl.int64)[:, None] * key_stride + i[None, :], stored, 0.0)
        v = tl.load(values + at.to(tl.int64)[:, None] * value_stride + i[None, :], stored, 0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        sees = real[:, None] & (at[None, :] <= slot[:, None])
        if WINDOW:
            sees = sees & (at[None, :] > slot[:, None] - window)
        scores = tl.where(sees, scores, float("-inf"))
        raised = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        mixed_here = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        sum_of_values = sum_of_values * shrink[:, None] + mixed_here
        top = raised
    tl.store(tops + out, top)
    tl.store(sums + out, total)
    tl.store(mixed + out[:, None] * WIDTH + i[None, :], sum_of_values, across)


@triton.jit
def _join_kernel(
    mixed, tops, sums, sinks, output,
    output_row_stride, output_stride, output_head_stride,
    queries, groups, slices,
    SINKS: tl.constexpr, QUERIES: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Output [R, n, H, D] of one query of one head from all slices; zeros for queries that are not there."""
    row, head, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = (head % groups) * queries + place
    s, i = tl.arange(0, SLICES), tl.arange(0, DIM)
    at = ((row * (tl.num_programs(1) // groups) + head // groups).to(tl.int64) * slices + s) * QUERIES + m
    top = tl.load(tops + at, s < slices, float("-inf"))
    seen = top > float("-inf")
    highest = tl.max(top, 0)
    nothing = highest == float("-inf")
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.where(seen, tl.exp(top - safe), 0.0)
    total = tl.sum(tl.load(sums + at, seen, 0.0) * share, 0)
    if SINKS:
        total += tl.exp(sink - safe)
    across = (i < WIDTH)[None, :]
    parts = tl.load(mixed + at[:, None] * WIDTH + i[None, :], seen[:, None] & across, 0.0)
    result = tl.sum(parts * share[:, None], 0) / tl.where(nothing, 1.0, total)
    to = output + row.to(tl.int64) * output_row_stride + place * output_stride + head * output_head_stride
    tl.store(to + i, result.to(output.dtype.element_ty), i < WIDTH)


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
    tops, sums = (query.new_empty(rows, kv_heads, slices, block, dtype=torch.float32) for _ in range(2))
    mixed = query.new_empty(rows, kv_heads, slices, block, width, dtype=torch.float32)
    _slice_kernel[rows, kv_heads, slices](
        query, key, value, starts.contiguous(), counts.contiguous(), mixed, tops, sums,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, groups, slices, scale, window or 0,
        WINDOW=window is not None, QUERIES=block, WIDTH=width, DIM=dim, SLICE=SLICE, TILE=TILE, WIDEN=not query.is_cuda,
    )  # fmt: skip
    _join_kernel[rows, heads, queries](
        mixed, tops, sums, tops if sinks is None else sinks, output, *output.stride()[:3],
        queries, groups, slices,
        SINKS=sinks is not None, QUERIES=block, SLICES=triton.next_power_of_2(slices), WIDTH=width, DIM=dim,
    )  # fmt: skip
    return output
