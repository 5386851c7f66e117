"""Sequential sampling: one token a row from base logits plus the sequential head's bias, left to right.

logits[r, v] = base[r, k, v] + sum_i embedded[r, i] W2[v, i], and embedded[r] is the W1 row of the token before. Bytes a
position, with R rows, V tokens, rank n, b bytes a number: V n b for W2, once for every 64 rows; R V b base logits;
R n b of W1, which every tile of 256 tokens reads anew from the second-level cache. Written are 8 bytes a row and tile,
by atomics on the same 8 bytes a row, and 4 R V only when the logits are wanted. One launch a position, as each needs
the token before it, and one for all of them at the end.
"""

import torch
import triton
import triton.language as tl

from .random import RACE, exponential, numbers

INVALID = tl.constexpr(-1)
# Tokens of each quarter of the vocabulary that a program goes through, and rows at most.
TILE, MOST_ROWS = 64, 64
SMALLEST_KEY = -(2**63)


@triton.jit
def _key(score, token):
    """int64 that sorts by score, then by token falling; NaN above everything."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    return tl.where(score != score, 0x7FFFFFFF80000000, key)


@triton.jit
def _token(key):
    """The token of a key; -1 for NaN, and where every score was -inf."""
    # -inf as an ordered integer.
    nothing = (key >> 32) == -2139095041
    return tl.where(nothing, INVALID, 0x7FFFFFFF - (key & 0xFFFFFFFF))


@triton.jit
def _position_kernel(
    base, w1, w2, anchors, seeds, keys, logits,
    base_row_stride, base_position_stride, base_stride, w1_stride, w2_stride,
    rows, rank, vocabulary, quarter, position, positions, scale,
    LOOKUP: tl.constexpr, SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of the vocabulary for all rows, and the best of them into `keys` [L, R].

    LOOKUP: w1 [V, n] is indexed by the token before, else it holds the embedded rows [R, n] themselves.
    SAMPLE: best by exponential race, and the scaled logits [R, L, V] float32 are written; else best by size.
    WIDEN: products in float32 whatever the dtype, as Triton's interpreter knows none of bfloat16.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask_rows = row < rows
    if LOOKUP:
        if position == 0:
            w1_row = tl.load(anchors + row, mask_rows, 0)
        else:
            w1_row = _token(tl.load(keys + (position - 1) * rows + row, mask_rows, 0))
        # A row without a token goes on from the first; it stays invalid.
        w1_row = tl.maximum(w1_row, 0)
    else:
        w1_row = row.to(tl.int64)
    i = tl.arange(0, RANK)
    embedded = tl.load(w1 + w1_row[:, None] * w1_stride + i[None, :], mask_rows[:, None] & (i < rank)[None, :], 0.0)
    counter = tile * TILE + tl.arange(0, TILE)
    if SAMPLE:
        seed = tl.load(seeds + row, mask_rows, 0)
        drawn = numbers(seed[:, None], counter[None, :] + (row * 0)[:, None], RACE + 2 + position)
    best = tl.full((ROWS,), -9223372036854775808, tl.int64)
    for lane in tl.static_range(4):
        tokens = lane * quarter + counter
        mask_tokens = (counter < quarter) & (tokens < vocabulary)
        mask = mask_rows[:, None] & mask_tokens[None, :]
        weights = tl.load(
            w2 + tokens.to(tl.int64)[:, None] * w2_stride + i[None, :], mask_tokens[:, None] & (i < rank)[None, :], 0.0
        )
        at = row.to(tl.int64)[:, None] * base_row_stride + position * base_position_stride
        x = tl.load(base + at + tokens.to(tl.int64)[None, :] * base_stride, mask, 0.0).to(tl.float32)
        if WIDEN:
            embedded, weights = embedded.to(tl.float32), weights.to(tl.float32)
        x += tl.dot(embedded, tl.trans(weights), input_precision="ieee")
        x = tl.where(mask, x * scale, float("-inf"))
        score = x
        if SAMPLE:
            out = (row.to(tl.int64)[:, None] * positions + position) * vocabulary + tokens[None, :]
            tl.store(logits + out, x, mask)
            score = x - tl.log(exponential(drawn[lane]))
        score = tl.where(mask, score, float("-inf"))
        best = tl.maximum(best, tl.max(_key(score, tokens[None, :] + (row * 0)[:, None]), 1))
    tl.atomic_max(keys + position * rows + row, best, mask_rows)


@triton.jit
def _tokens_kernel(keys, tokens, rows, positions):
    """Tokens [R, L] of the keys [L, R]. A row stays without a token from its first on."""
    row = tl.program_id(0)
    valid = True
    for position in range(positions):
        token = _token(tl.load(keys + position * rows + row))
        valid = valid & (token >= 0)
        tl.store(tokens + row * positions + position, tl.where(valid, token, INVALID))


def sample_block(
    base_logits: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    anchors: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dspark_kernels.sample_block`. A launch a position, one before and one after."""
    rows, positions, vocabulary = base_logits.shape
    found, anchors = _Outputs(base_logits, seeds is not None), anchors.contiguous()
    if rows == 0:
        return found.of()
    for k in range(positions):
        _launch(found, base_logits, w1, w2, anchors, seeds, temperature, k, lookup=True)
    return found.of()


def sample_position(
    base_logits: torch.Tensor,
    embedded: torch.Tensor,
    w2: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dspark_kernels.sample_position`. Three launches."""
    found = _Outputs(base_logits[:, None], seeds is not None)
    if len(base_logits):
        _launch(found, base_logits[:, None], embedded, w2, embedded, seeds, temperature, 0, lookup=False)
    tokens, logits = found.of()
    return tokens[:, 0], None if logits is None else logits[:, 0]


class _Outputs:
    """What the launches over base logits [R, L, V] write."""

    def __init__(self, base_logits: torch.Tensor, samples: bool):
        self.rows, self.positions, vocabulary = base_logits.shape
        new = base_logits.new_empty
        self.tiles = triton.cdiv(triton.cdiv(vocabulary, 4), TILE)
        self.keys = new(self.positions, self.rows, dtype=torch.int64).fill_(SMALLEST_KEY)
        self.tokens = new(self.rows, self.positions, dtype=torch.int64)
        self.logits = new(base_logits.shape, dtype=torch.float32) if samples else None

    def of(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and logits, once everything is launched."""
        if self.rows and self.positions:
            _tokens_kernel[self.rows,](self.keys, self.tokens, self.rows, self.positions)
        return self.tokens, self.logits


def _launch(found, base_logits, w1, w2, anchors, seeds, temperature, position, lookup) -> None:
    rows, positions, vocabulary = base_logits.shape
    quarter = triton.cdiv(vocabulary, 4)
    block = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    _position_kernel[found.tiles, triton.cdiv(rows, block)](
        base_logits, w1, w2, anchors, (anchors if seeds is None else seeds).contiguous(), found.keys,
        found.keys if found.logits is None else found.logits,
        *base_logits.stride(), w1.stride(0), w2.stride(0),
        rows, w2.shape[1], vocabulary, quarter, position, positions, 1.0 / temperature,
        LOOKUP=lookup, SAMPLE=seeds is not None,
        ROWS=block, RANK=max(16, triton.next_power_of_2(w2.shape[1])), TILE=TILE,
        WIDEN=not base_logits.is_cuda,
    )  # fmt: skip
