"""Verification: from logits to accepted counts and next tokens.

Bytes, with R rows, row r of length l_r <= L, V tokens, b bytes a logit: sampled reads V b sum_r (2 l_r + 1) for the
log-sum-exps and at most 2 V b R once more for the token after the accepted drafts (V b for a row of which all were
accepted); greedy reads V b sum_r (l_r + 1). Positions behind a row's length are not read. Between launches 8 bytes are
written of every slice of 16,384 logits that was read; sampled reads them once for each of the V / 16,384 parts of the
row's race, and each part writes 16 bytes.
"""

import torch
import triton
import triton.language as tl

from .random import ACCEPT, RACE, exponential, numbers, uniform

# Logits that a program goes through, and of those how many at a time.
SLICE, TILE = 16384, 4096
INVALID = tl.constexpr(-1)


@triton.jit
def _argmax_kernel(
    logits, lengths, best, index,
    row_stride, position_stride, token_stride,
    vocabulary, positions, slices,
    SLICE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of a slice of logits[r, j] the largest and its first index; NaN if one of them is."""
    row, position, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if position > tl.load(lengths + row):
        return
    base = logits + row.to(tl.int64) * row_stride + position.to(tl.int64) * position_stride
    top, where, bad = tl.full((), float("-inf"), tl.float32), part * SLICE, 0
    for start in range(0, SLICE, TILE):
        tokens = part * SLICE + start + tl.arange(0, TILE)
        x = tl.load(base + tokens.to(tl.int64) * token_stride, tokens < vocabulary, float("-inf")).to(tl.float32)
        highest = tl.max(x, 0)
        first = tl.min(tl.where(x == highest, tokens, vocabulary), 0)
        where = tl.where(highest > top, first, where)
        top = tl.maximum(top, highest)
        bad += tl.sum((x != x).to(tl.int32), 0)
    out = (row * positions + position) * slices + part
    tl.store(best + out, tl.where(bad > 0, float("nan"), top))
    tl.store(index + out, where)


@triton.jit
def _greedy_kernel(
    best, index, drafts, lengths, accepted, next_tokens,
    draft_row_stride, draft_stride, positions, slices,
    POSITIONS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Leading drafts of a row that are the target's choice, and the choice behind them."""
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    j, s = tl.arange(0, POSITIONS), tl.arange(0, SLICES)
    at = (row * positions + j[:, None]) * slices + s[None, :]
    read = j <= length
    mask = read[:, None] & (s < slices)[None, :]
    largest = tl.load(best + at, mask, float("-inf"))
    highest = tl.max(largest, 1)
    # Slices come in order of their tokens, so the least index among the highest is the first.
    choices = tl.min(tl.where(largest == highest[:, None], tl.load(index + at, mask, 0), 2147483647), 1)
    bad = read & ((highest == float("-inf")) | (tl.sum((largest != largest).to(tl.int32), 1) > 0))
    drafted = tl.load(drafts + row.to(tl.int64) * draft_row_stride + j * draft_stride, j < length, -1)
    count = tl.min(tl.where((j < length) & (drafted == choices), POSITIONS, j), 0)
    token = tl.sum(tl.where(j == count, choices, 0), 0)
    invalid = tl.sum(bad.to(tl.int32), 0) > 0
    tl.store(accepted + row, tl.where(invalid, 0, count).to(tl.int64))
    tl.store(next_tokens + row, tl.where(invalid, INVALID, token).to(tl.int64))


@triton.jit
def _slice_log_sum_exp(base, token_stride, part, vocabulary, SLICE: tl.constexpr, TILE: tl.constexpr):
    """Largest m of a slice of logits, and the sum of exp(x - m)."""
    m, l_sum = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, SLICE, TILE):
        tokens = part * SLICE + start + tl.arange(0, TILE)
        x = tl.load(base + tokens.to(tl.int64) * token_stride, tokens < vocabulary, float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_sum = l_sum * tl.exp(m - m_safe) + tl.sum(tl.exp(x - m_safe), 0)
        m = m_new
    return m, l_sum


@triton.jit
def _log_sum_exp_kernel(
    target, draft, lengths, m_parts, l_parts,
    target_row_stride, target_position_stride, target_stride,
    draft_row_stride, draft_position_stride, draft_stride,
    vocabulary, positions, slices,
    SLICE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of target[r, j] and draft[r, j], slice by slice. m_parts, l_parts: [2, R, L+1, slices]."""
    row, position, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    if position > length:
        return
    out = (row * positions + position) * slices + part
    base = target + row.to(tl.int64) * target_row_stride + position.to(tl.int64) * target_position_stride
    m, l_sum = _slice_log_sum_exp(base, target_stride, part, vocabulary, SLICE, TILE)
    tl.store(m_parts + out, m)
    tl.store(l_parts + out, l_sum)
    if position < length:
        out += tl.num_programs(0) * positions * slices
        base = draft + row.to(tl.int64) * draft_row_stride + position.to(tl.int64) * draft_position_stride
        m, l_sum = _slice_log_sum_exp(base, draft_stride, part, vocabulary, SLICE, TILE)
        tl.store(m_parts + out, m)
        tl.store(l_parts + out, l_sum)


@triton.jit
def _combined(m_parts, l_parts, at, mask):
    """Log-sum-exps [POSITIONS] from those of the slices; 0 where nothing was read."""
    top = tl.load(m_parts + at, mask, float("-inf"))
    highest = tl.max(top, 1)
    m_safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.load(l_parts + at, mask, 0.0) * tl.exp(top - m_safe[:, None]), 1)
    anything = tl.sum(mask.to(tl.int32), 1) > 0
    return tl.where(anything, m_safe + tl.log(tl.where(anything, total, 1.0)), 0.0)


@triton.jit
def _race_winner(score, tokens, best, index):
    """The better of the best so far and the first best of a tile."""
    highest = tl.max(score, 0)
    first = tl.min(tl.where(score == highest, tokens, 2147483647), 0)
    better = (highest > best) | ((highest == best) & (first < index))
    return tl.where(better, highest, best), tl.where(better, first, index)


@triton.jit
def _race_kernel(
    target, draft, drafts, lengths, seeds, m_parts, l_parts, accepted, valid, best, index,
    target_row_stride, target_position_stride, target_stride,
    draft_row_stride, draft_position_stride, draft_stride,
    drafts_row_stride, drafts_stride,
    vocabulary, quarter, positions, slices, parts,
    POSITIONS: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Accept drafts with probability min(1, p/q); then a part of the exponential race for the token behind them.

    best, index: [2, R, parts], of the residual max(p - q, 0), and of p itself.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    length, seed = tl.load(lengths + row), tl.load(seeds + row)
    j, s = tl.arange(0, POSITIONS), tl.arange(0, SLICES)
    at = (row * positions + j[:, None]) * slices + s[None, :]
    sliced = (s < slices)[None, :]
    target_total = _combined(m_parts, l_parts, at, (j <= length)[:, None] & sliced)
    second = tl.num_programs(0) * positions * slices
    draft_total = _combined(m_parts, l_parts, at + second, (j < length)[:, None] & sliced)

    verified = j < length
    target_row = target + row.to(tl.int64) * target_row_stride
    draft_row = draft + row.to(tl.int64) * draft_row_stride
    x = tl.load(drafts + row.to(tl.int64) * drafts_row_stride + j * drafts_stride, verified, 0)
    t = tl.load(target_row + j.to(tl.int64) * target_position_stride + x * target_stride, verified, 0.0).to(tl.float32)
    d = tl.load(draft_row + j.to(tl.int64) * draft_position_stride + x * draft_stride, verified, 0.0).to(tl.float32)
    chance, _, _, _ = numbers(seed, j, ACCEPT)
    survives = uniform(chance) * tl.exp(d - draft_total) < tl.exp(t - target_total)
    count = tl.min(tl.where(verified & survives, POSITIONS, j), 0)

    total = tl.sum(tl.where(j == count, target_total, 0.0), 0)
    other_total = tl.sum(tl.where(j == count, draft_total, 0.0), 0)
    # Nothing is subtracted where nothing was rejected.
    subtracted = tl.where(count < length, vocabulary, 0)
    target_row += count.to(tl.int64) * target_position_stride
    draft_row += count.to(tl.int64) * draft_position_stride
    residual_best, residual_index = tl.full((), -1.0, tl.float32), tl.full((), 0, tl.int32)
    whole_best, whole_index = tl.full((), -1.0, tl.float32), tl.full((), 0, tl.int32)
    for start in range(0, SLICE, TILE):
        counter = part * SLICE + start + tl.arange(0, TILE)
        drawn = numbers(seed, counter, RACE)
        for lane in tl.static_range(4):
            tokens = lane * quarter + counter
            mask = (counter < quarter) & (tokens < vocabulary)
            race = exponential(drawn[lane])
            offset = tokens.to(tl.int64)
            y = tl.load(target_row + offset * target_stride, mask, float("-inf")).to(tl.float32)
            p = tl.where(mask, tl.exp(y - total), -1.0)
            mask_draft = mask & (tokens < subtracted)
            z = tl.load(draft_row + offset * draft_stride, mask_draft, float("-inf")).to(tl.float32)
            q = tl.where(mask_draft, tl.exp(z - other_total), 0.0)
            residual = tl.where(mask, tl.maximum(p - q, 0.0), -1.0)
            residual_best, residual_index = _race_winner(residual / race, tokens, residual_best, residual_index)
            whole_best, whole_index = _race_winner(p / race, tokens, whole_best, whole_index)
    out, second = row * parts + part, tl.num_programs(0) * parts
    tl.store(best + out, residual_best)
    tl.store(index + out, residual_index)
    tl.store(best + second + out, whole_best)
    tl.store(index + second + out, whole_index)
    if part == 0:
        finite = (tl.abs(target_total) < float("inf")) & (tl.abs(draft_total) < float("inf"))
        is_valid = tl.min(finite.to(tl.int32), 0)
        tl.store(accepted + row, (count * is_valid).to(tl.int64))
        tl.store(valid + row, is_valid)


@triton.jit
def _race_winner_kernel(best, index, valid, next_tokens, parts, PARTS: tl.constexpr):
    """The winner of a row's race: that for the residual, unless there is none."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    second = tl.num_programs(0) * parts
    residual, token = _race_winner(
        tl.load(best + row * parts + part, part < parts, -2.0), tl.load(index + row * parts + part, part < parts, 0),
        tl.full((), -2.0, tl.float32), tl.full((), 0, tl.int32),
    )  # fmt: skip
    _, other = _race_winner(
        tl.load(best + second + row * parts + part, part < parts, -2.0),
        tl.load(index + second + row * parts + part, part < parts, 0),
        tl.full((), -2.0, tl.float32), tl.full((), 0, tl.int32),
    )  # fmt: skip
    token = tl.where(residual > 0, token, other)
    tl.store(next_tokens + row, tl.where(tl.load(valid + row) > 0, token, INVALID).to(tl.int64))


def verify_greedy(
    target_logits: torch.Tensor, draft_tokens: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dspark_kernels.verify_greedy`. Two launches."""
    rows, positions, vocabulary = target_logits.shape
    lengths = lengths.contiguous()
    slices, tile = triton.cdiv(vocabulary, SLICE), _tile(vocabulary)
    best = target_logits.new_empty(rows, positions, slices, dtype=torch.float32)
    index = torch.empty_like(best, dtype=torch.int32)
    accepted, next_tokens = (lengths.new_empty(rows, dtype=torch.int64) for _ in range(2))
    if rows == 0:
        return accepted, next_tokens
    _argmax_kernel[rows, positions, slices](
        target_logits, lengths, best, index, *target_logits.stride(), vocabulary, positions, slices,
        SLICE=max(tile, min(SLICE, triton.next_power_of_2(vocabulary))), TILE=tile,
    )  # fmt: skip
    _greedy_kernel[rows,](
        best, index, draft_tokens, lengths, accepted, next_tokens, *draft_tokens.stride(), positions, slices,
        POSITIONS=triton.next_power_of_2(positions), SLICES=triton.next_power_of_2(slices),
    )  # fmt: skip
    return accepted, next_tokens


def verify_sampled(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `dspark_kernels.verify_sampled`. Three launches."""
    rows, positions, vocabulary = target_logits.shape
    lengths, seeds = lengths.contiguous(), seeds.contiguous()
    slices, quarter = triton.cdiv(vocabulary, SLICE), triton.cdiv(vocabulary, 4)
    tile, race_tile = _tile(vocabulary), _tile(quarter, TILE // 4)
    race_slice = max(race_tile, min(SLICE // 4, triton.next_power_of_2(quarter)))
    parts = triton.cdiv(quarter, race_slice)
    new = target_logits.new_empty
    m_parts, l_parts = (new(2, rows, positions, slices, dtype=torch.float32) for _ in range(2))
    best, index = new(2, rows, parts, dtype=torch.float32), new(2, rows, parts, dtype=torch.int32)
    valid = new(rows, dtype=torch.int32)
    accepted, next_tokens = (new(rows, dtype=torch.int64) for _ in range(2))
    if rows == 0:
        return accepted, next_tokens
    strides = *target_logits.stride(), *draft_logits.stride()
    _log_sum_exp_kernel[rows, positions, slices](
        target_logits, draft_logits, lengths, m_parts, l_parts, *strides, vocabulary, positions, slices,
        SLICE=max(tile, min(SLICE, triton.next_power_of_2(vocabulary))), TILE=tile,
    )  # fmt: skip
    _race_kernel[rows, parts](
        target_logits, draft_logits, draft_tokens, lengths, seeds, m_parts, l_parts, accepted, valid, best, index,
        *strides, *draft_tokens.stride(), vocabulary, quarter, positions, slices, parts,
        POSITIONS=triton.next_power_of_2(positions), SLICES=triton.next_power_of_2(slices),
        SLICE=race_slice, TILE=race_tile,
    )  # fmt: skip
    _race_winner_kernel[rows,](best, index, valid, next_tokens, parts, PARTS=triton.next_power_of_2(parts))
    return accepted, next_tokens


def _tile(count: int, most: int = TILE) -> int:
    return min(most, triton.next_power_of_2(count))
