"""Weights of a head that are stored in parts or quantised, read when they are asked for."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from .headers import TensorHeader

FP8, PACKED_FP4, SCALE = "F8_E4M3", "I8", "F8_E8M0"
# Columns that share a scale in FP4.
GROUP = 32
# FP4 e2m1: a sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])


@dataclass(frozen=True)
class Part:
    """A tensor of a file and, where it is quantised, its scales."""

    name: str
    header: TensorHeader
    scale_name: str | None = None

    @property
    def columns(self) -> int:
        """Of the tensor when it is dequantised."""
        return self.header.shape[-1] * (2 if self.header.dtype == PACKED_FP4 else 1)


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a head: one of a file, or matrices of `experts` that lie one above the other.

    block: rows and columns that share a scale in FP8. It is read by `weight[...]`, as transformers reads a slice of a
    file.
    """

    parts: Sequence[Part]
    block: tuple[int, int]
    experts: int | None = None

    @property
    def name(self) -> str:
        """What the file calls the first part."""
        return self.parts[0].name

    @property
    def header(self) -> TensorHeader:
        """Of what is read: quantised values are exact in bfloat16."""
        first = self.parts[0]
        quantised = any(part.scale_name for part in self.parts)
        return TensorHeader(first.header.file, "BF16" if quantised else first.header.dtype, self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        if self.experts is None:
            return (*first.header.shape[:-1], first.columns)
        rows = sum(part.header.shape[0] for part in self.parts)
        return (self.experts, rows // self.experts, first.columns)

    def __getitem__(self, index: Any) -> torch.Tensor:
        with ExitStack() as stack:
            paths = {part.header.file for part in self.parts}
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            first = self._read(self.parts[0], files)
            if self.experts is None:
                return first[index]
            whole = first.new_empty(self.shape)
            # In place, so that no second copy is needed.
            places = whole.view(-1, first.shape[1]).split([part.header.shape[0] for part in self.parts])
            for part, place in zip(self.parts, places, strict=True):
                place.copy_(self._read(part, files))
        return whole[index]

    def _read(self, part: Part, files: dict[str, Any]) -> torch.Tensor:
        file = files[part.header.file]
        stored = file.get_tensor(part.name)
        if part.scale_name is None:
            return stored
        scale = file.get_tensor(part.scale_name)
        if part.header.dtype == PACKED_FP4:
            return dequantise_fp4(stored, scale).to(torch.bfloat16)
        return dequantise_fp8(stored, scale, self.block).to(torch.bfloat16)


def dequantise_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[N, K] float32 from e4m3 values and a power of two for each block of rows and columns; those at the edges may be
    smaller."""
    rows, columns = (torch.arange(size) // side for size, side in zip(weight.shape, block, strict=True))
    return weight.float() * scale.float()[rows][:, columns]


def dequantise_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, K] float32 from bytes [N, K / 2] of two e2m1 values, that of the lower four bits first, and a power of two
    [N, K / 32] for each 32 columns."""
    pairs = packed.view(torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    values = E2M1[codes.long()].unflatten(1, (-1, GROUP))
    return (values * scale.float()[..., None]).flatten(1)
