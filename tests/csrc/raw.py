"""Memory as kernels see it: addresses that no vector is aligned to, and guards that nothing may write."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tails of every length around a vector and around four of them, for 4, 8 and 16 lanes; one width past the L1 cache.
WIDTHS = (1, 2, 3, 7, 16, 17, 31, 63, 64, 65, 127, 1000, 9001)
GUARD = 5


class Output:
    """Memory to be written whole: NaN inside, a guard on both sides, at an address that no vector is aligned to."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel()
        self.memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype)
        self.memory[:GUARD] = self.memory[GUARD + size :] = 42.0
        self.inside = self.memory[GUARD : GUARD + size].view(shape)

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def written(self) -> Tensor:
        size = self.inside.numel()
        assert (self.memory[:GUARD] == 42.0).all(), "written before the start"
        assert (self.memory[GUARD + size :] == 42.0).all(), "written past the end"
        return self.inside


def strided(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random rows that lie further apart than they are long, at an odd address."""
    data = torch.randn(rows, cols + 3, generator=generator).to(dtype)
    return data[:, 1 : cols + 1]
