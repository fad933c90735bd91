"""Counts of what a launch did. They are the same on every machine, and are no times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32
"""Bytes of global memory that are fetched or written together."""

BANKS = 32
"""Banks of shared memory, each 4 bytes wide."""


@dataclass
class Requests:
    """Requests of warps to one memory in one direction.

    Attributes:
        requests: instructions, each counted for every warp that takes part.
        bytes: asked for by all lanes together.
        unique_bytes: bytes, each counted once a request.
        wide_bytes: of these, in accesses of 16 bytes.
        units: global memory: 32-byte sectors; shared memory: passes over the banks.
        fewest_units: the least that so many unique bytes could take.
    """

    requests: int = 0
    bytes: int = 0
    unique_bytes: int = 0
    wide_bytes: int = 0
    units: int = 0
    fewest_units: int = 0

    @property
    def efficiency(self) -> float:
        """Fewest units over units; 1 for no request."""
        return self.fewest_units / self.units if self.units else 1.0

    @property
    def conflicts(self) -> float:
        """Units beyond the fewest, a request: the bank conflicts of an access to shared memory."""
        return (self.units - self.fewest_units) / self.requests if self.requests else 0.0


@dataclass
class Counts:
    """What the CTAs of a launch did, all together.

    Attributes:
        ctas: CTAs that ran.
        barriers: of CTAs.
        instructions: by opcode, each counted for every warp that executes it.
        lanes: by opcode, each counted for every lane that executes it and is not predicated off.
        loads: from global memory, cp.async included.
        stores: to global memory.
        shared_loads: from shared memory, ldmatrix included.
        shared_stores: to shared memory, cp.async included.
        loaded: bytes of the distinct sectors that each CTA loads, summed over CTAs, by argument.
        stored: the same of stores.
        distinct: bytes of the sectors that any CTA loads, and of those that any stores, each sector counted once.
        operand_bytes: that wgmma reads from shared memory.
    """

    ctas: int = 0
    barriers: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    lanes: Counter[str] = field(default_factory=Counter)
    loads: Requests = field(default_factory=Requests)
    stores: Requests = field(default_factory=Requests)
    shared_loads: Requests = field(default_factory=Requests)
    shared_stores: Requests = field(default_factory=Requests)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    distinct: int = 0
    operand_bytes: int = 0

    @property
    def traffic(self) -> int:
        """Bytes of distinct sectors, loaded and stored, summed over CTAs."""
        return sum(self.loaded.values()) + sum(self.stored.values())


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Whether an element of a sorted row is the first of its value; negative ones are none."""
    first = np.empty(rows.shape, bool)
    first[:, 0] = True
    np.not_equal(rows[:, 1:], rows[:, :-1], out=first[:, 1:])
    return first & (rows >= 0)


def count_global(into: Requests, offsets: np.ndarray, width: int, active: np.ndarray | None) -> None:
    """Adds a request of `width` bytes at each lane's offset; lanes that are not active ask for nothing."""
    rows = (offsets if active is None else np.where(active, offsets, -SECTOR)).reshape(-1, 32)
    rows = np.sort(rows, axis=1)
    lanes = rows.size if active is None else int(np.count_nonzero(active))
    unique = _distinct(rows)
    bytes_of_warp = np.count_nonzero(unique, axis=1) * width
    sectors = np.count_nonzero(_distinct(rows // SECTOR), axis=1)
    if width > SECTOR:
        raise AssertionError("an access wider than a sector")
    into.requests += int(np.count_nonzero(bytes_of_warp))
    into.bytes += lanes * width
    into.unique_bytes += int(bytes_of_warp.sum())
    into.wide_bytes += int(bytes_of_warp.sum()) if width >= 16 else 0
    into.units += int(sectors.sum())
    into.fewest_units += int((-(-bytes_of_warp // SECTOR)).sum())


def count_shared(into: Requests, offsets: np.ndarray, width: int, active: np.ndarray | None) -> None:
    """Adds a request of `width` bytes at each lane's offset.

    A request wider than 4 bytes is served a half or a quarter of a warp at a time; what is served at a time takes as
    many passes as its busiest bank has different words. Source: CUDA C++ Best Practices Guide, shared memory; for wide
    accesses, NVIDIA's profiler documentation of shared memory wavefronts.
    """
    lanes_at_once = 32 if width <= 4 else 128 // width
    words = offsets[:, None] // 4 + np.arange(max(1, width // 4))
    if active is not None:
        words = np.where(active[:, None], words, -1)
        asked = int(np.count_nonzero(active))
        requests = int(np.count_nonzero(active.reshape(-1, 32).any(axis=1)))
    else:
        asked, requests = offsets.size, offsets.size // 32
    rows = np.sort(words.reshape(-1, lanes_at_once * words.shape[1]), axis=1)
    first = _distinct(rows)
    at = np.flatnonzero(first)
    banks = (at // rows.shape[1]) * BANKS + rows.ravel()[at] % BANKS
    passes = np.bincount(banks, minlength=len(rows) * BANKS).reshape(-1, BANKS).max(axis=1)
    distinct = np.count_nonzero(first, axis=1)
    into.requests += requests
    into.bytes += asked * width
    of_warp = np.sort((offsets if active is None else np.where(active, offsets, -1)).reshape(-1, 32), axis=1)
    into.unique_bytes += int(np.count_nonzero(_distinct(of_warp))) * width
    into.units += int(passes.sum())
    into.fewest_units += int((-(-distinct // BANKS)).sum())
