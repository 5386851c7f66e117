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
    base, w1, w2, anchors, seeds, keys, logits, tops, sums,
    base_row_stride, base_position_stride, base_stride, w1_stride, w2_stride,
    rows, rank, vocabulary, quarter, position, positions, tiles, scale,
    LOOKUP: tl.constexpr, SAMPLE: tl.constexpr, WRITE: tl.constexpr, TOTALS: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of the vocabulary for all rows, and the best of them into `keys` [L, R].

    LOOKUP: w1 [V, n] is indexed by the token before, else it holds the embedded rows [R, n] themselves.
    SAMPLE: best by exponential race, else by size. WRITE: logits [R, L, V] float32, scaled. TOTALS: of each tile the
    largest scaled logit and the sum of exp(x - largest), [R, L, tiles]. WIDEN: products in float32 whatever the dtype,
    as Triton's interpreter knows none of bfloat16.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    if LOOKUP:
        if position == 0:
            line = tl.load(anchors + row, real, 0)
        else:
            line = _token(tl.load(keys + (position - 1) * rows + row, real, 0))
        # A row without a token goes on from the first; it stays invalid.
        line = tl.maximum(line, 0)
    else:
        line = row.to(tl.int64)
    i = tl.arange(0, RANK)
    embedded = tl.load(w1 + line[:, None] * w1_stride + i[None, :], real[:, None] & (i < rank)[None, :], 0.0)
    counter = tile * TILE + tl.arange(0, TILE)
    if SAMPLE:
        seed = tl.load(seeds + row, real, 0)
        drawn = numbers(seed[:, None], counter[None, :] + (row * 0)[:, None], RACE + 2 + position)
    best = tl.full((ROWS,), -9223372036854775808, tl.int64)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for lane in tl.static_range(4):
        tokens = lane * quarter + counter
        here = (counter < quarter) & (tokens < vocabulary)
        both = real[:, None] & here[None, :]
        weights = tl.load(
            w2 + tokens.to(tl.int64)[:, None] * w2_stride + i[None, :], here[:, None] & (i < rank)[None, :], 0.0
        )
        at = row.to(tl.int64)[:, None] * base_row_stride + position * base_position_stride
        x = tl.load(base + at + tokens.to(tl.int64)[None, :] * base_stride, both, 0.0).to(tl.float32)
        if WIDEN:
            embedded, weights = embedded.to(tl.float32), weights.to(tl.float32)
        x += tl.dot(embedded, tl.trans(weights), input_precision="ieee")
        x = tl.where(both, x * scale, float("-inf"))
        if WRITE:
            out = (row.to(tl.int64)[:, None] * positions + position) * vocabulary + tokens[None, :]
            tl.store(logits + out, x, both)
        if TOTALS:
            raised = tl.maximum(top, tl.max(x, 1))
            safe = tl.where(raised == float("-inf"), 0.0, raised)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
            top = raised
        score = x - tl.log(exponential(drawn[lane])) if SAMPLE else x
        score = tl.where(both, score, float("-inf"))
        best = tl.maximum(best, tl.max(_key(score, tokens[None, :] + (row * 0)[:, None]), 1))
    tl.atomic_max(keys + position * rows + row, best, real)
    if TOTALS:
        out = (row * positions + position) * tiles + tile
        tl.store(tops + out, top, real)
        tl.store(sums + out, total, real)


@triton.jit
def _tokens_kernel(keys, tokens, tops, sums, totals, rows, positions, tiles, TOTALS: tl.constexpr, TILES: tl.constexpr):
    """Tokens [R, L] of the keys [L, R], and log-sum-exps [R, L]. A row stays without a token from its first on."""
    row = tl.program_id(0)
    valid = True
    for position in range(positions):
        token = _token(tl.load(keys + position * rows + row))
        valid = valid & (token >= 0)
        tl.store(tokens + row * positions + position, tl.where(valid, token, INVALID))
        if TOTALS:
            tile = tl.arange(0, TILES)
            at = (row * positions + position) * tiles + tile
            top = tl.load(tops + at, tile < tiles, float("-inf"))
            highest = tl.max(top, 0)
            total = tl.sum(tl.load(sums + at, tile < tiles, 0.0) * tl.exp(top - highest), 0)
            tl.store(totals + row * positions + position, highest + tl.log(total))


def sample_block(
    base_logits: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    anchors: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
    return_logits: bool = False,
    return_totals: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See `dspark_kernels.sample_block`. A launch a position, one before and one after."""
    rows, positions, vocabulary = base_logits.shape
    found, anchors = _Outputs(base_logits, return_logits, return_totals), anchors.contiguous()
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
    return_logits: bool = False,
    return_totals: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See `dspark_kernels.sample_position`. Three launches."""
    found = _Outputs(base_logits[:, None], return_logits, return_totals)
    if len(base_logits):
        _launch(found, base_logits[:, None], embedded, w2, embedded, seeds, temperature, 0, lookup=False)
    tokens, logits, totals = found.of()
    return tokens[:, 0], None if logits is None else logits[:, 0], None if totals is None else totals[:, 0]


class _Outputs:
    """What the launches over base logits [R, L, V] write."""

    def __init__(self, base_logits: torch.Tensor, logits: bool, totals: bool):
        self.rows, self.positions, vocabulary = base_logits.shape
        new = base_logits.new_empty
        self.tiles = triton.cdiv(triton.cdiv(vocabulary, 4), TILE)
        self.keys = new(self.positions, self.rows, dtype=torch.int64).fill_(SMALLEST_KEY)
        self.tokens = new(self.rows, self.positions, dtype=torch.int64)
        self.logits = new(base_logits.shape, dtype=torch.float32) if logits else None
        partial = (self.rows, self.positions, self.tiles) if totals else 0
        self.tops, self.sums = (new(partial, dtype=torch.float32) for _ in range(2))
        self.totals = new(self.rows, self.positions, dtype=torch.float32) if totals else None

    def of(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Tokens, logits and log-sum-exps, once everything is launched."""
        if self.rows and self.positions:
            wanted = self.totals is not None
            _tokens_kernel[self.rows,](
                self.keys, self.tokens, self.tops, self.sums, self.totals if wanted else self.sums,
                self.rows, self.positions, self.tiles, TOTALS=wanted, TILES=triton.next_power_of_2(self.tiles),
            )  # fmt: skip
        return self.tokens, self.logits, self.totals


def _launch(found, base_logits, w1, w2, anchors, seeds, temperature, position, lookup) -> None:
    rows, positions, vocabulary = base_logits.shape
    quarter = triton.cdiv(vocabulary, 4)
    block = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    _position_kernel[found.tiles, triton.cdiv(rows, block)](
        base_logits, w1, w2, anchors, (anchors if seeds is None else seeds).contiguous(), found.keys,
        found.sums if found.logits is None else found.logits, found.tops, found.sums,
        *base_logits.stride(), w1.stride(0), w2.stride(0),
        rows, w2.shape[1], vocabulary, quarter, position, positions, found.tiles, 1.0 / temperature,
        LOOKUP=lookup, SAMPLE=seeds is not None, WRITE=found.logits is not None, TOTALS=found.totals is not None,
        ROWS=block, RANK=max(16, triton.next_power_of_2(w2.shape[1])), TILE=TILE,
        WIDEN=not base_logits.is_cuda,
    )  # fmt: skip
