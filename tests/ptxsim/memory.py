"""Global and shared memory that notice what a device would not tell: bounds, alignment, races, data still in flight.

Memory is watched in grains: as many bytes as the narrowest access of the program has. Two accesses to a grain, one of
them a store, by different threads of a CTA are a race unless a barrier lies between them; by different CTAs they always
are one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptxsim.counting import SECTOR, Counts, count_global, count_shared
from tests.ptxsim.faults import Fault

BASE = 1 << 40
"""Address at which global memory begins."""

RED_ZONE = 1 << 15
"""Bytes between arrays that belong to none: more than a tile's row runs past an end."""

ALIGNED = 256
"""Arrays are as aligned as they were, up to so many bytes."""

_MANY = (1 << 20) - 1


class Watch:
    """Who last stored and who loaded each grain since the last barrier.

    An entry is ``epoch * 2^20 + code``; one of an earlier epoch counts as none. Codes, with N threads and W warps:
    a thread t: t; a warp, before its last ``bar.warp.sync``: N + w; several lanes of a warp: N + W + w; several warps.
    """

    def __init__(self, grains: int) -> None:
        self.stored = np.full(grains, -1, np.int64)
        self.loaded = np.full(grains, -1, np.int64)
        self.epoch = 0
        self.threads = self.warps = 0

    def begin(self, threads: int) -> None:
        """A CTA of so many threads begins."""
        self.threads, self.warps = threads, threads // 32
        self.barrier()

    def barrier(self) -> None:
        """What happened so far is ordered before what follows."""
        self.epoch += 1 << 20

    def warp_barrier(self, warps: np.ndarray) -> None:
        """The same, among the threads of each of the warps."""
        for entries in (self.stored, self.loaded):
            current = np.flatnonzero(entries >= self.epoch)
            code = entries[current] - self.epoch
            owner = self._warp(code)
            ours = np.isin(owner, warps)
            entries[current[ours]] = self.epoch + self.threads + owner[ours]

    def _warp(self, code: np.ndarray) -> np.ndarray:
        """The warp of a code; -1 for several or none."""
        n, w = self.threads, self.warps
        warp = np.where(code < n, code // 32, (code - n) % max(w, 1))
        return np.where((code < 0) | (code >= n + 2 * w), -1, warp)

    def _strangers(self, entries: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Whether an entry is of this epoch and not ordered before what `thread` does now."""
        code = entries - self.epoch
        return (code >= 0) & (code != thread) & (code != self.threads + thread // 32)

    def load(self, grains: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Notes loads, and returns which of them race with an earlier store."""
        races = self._strangers(self.stored[grains], thread)
        n, w, warp = self.threads, self.warps, thread // 32
        code = self.loaded[grains] - self.epoch
        others = (code >= 0) & (code != thread) & (code != n + warp)
        new = np.where(others, np.where(self._warp(code) == warp, n + w + warp, _MANY), thread)
        self.loaded[grains] = self.epoch + new
        # Lanes of this very load that meet in a grain: the last one's entry stands.
        back = self.loaded[grains] - self.epoch
        clash = back != new
        if clash.any():
            same = clash & (self._warp(back) == warp)
            self.loaded[grains[same]] = self.epoch + (n + w + warp[same])
            self.loaded[grains[clash & ~same]] = self.epoch + _MANY
        return races

    def store(self, grains: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Notes stores, and returns which of them race with an earlier load or store."""
        races = self._strangers(self.stored[grains], thread) | self._strangers(self.loaded[grains], thread)
        self.stored[grains] = self.epoch + thread
        return races

    def store_by_many(self, grains: np.ndarray, thread: np.ndarray) -> None:
        """Lays stores, which have been noted, to several lanes of the warp of `thread`."""
        self.stored[grains] = self.epoch + self.threads + self.warps + thread // 32

    def load_by_many(self, grains: np.ndarray, thread: np.ndarray | None) -> np.ndarray:
        """Notes loads for others: by all lanes of the warp of `thread`, or by several warps where that is None.

        Returns which of them race with an earlier store: only a warp's own from before its last barrier does not.
        """
        code = self.stored[grains] - self.epoch
        if thread is None:
            self.loaded[grains] = self.epoch + _MANY
            return code >= 0
        warp = thread // 32
        before = self._warp(self.loaded[grains] - self.epoch)
        alone = (self.loaded[grains] < self.epoch) | (before == warp)
        self.loaded[grains] = self.epoch + np.where(alone, self.threads + self.warps + warp, _MANY)
        back = self.loaded[grains] - self.epoch
        self.loaded[grains[self._warp(back) != warp]] = self.epoch + _MANY
        return (code >= 0) & (code != self.threads + warp)


def _grains(offsets: np.ndarray, width: int, grain: int) -> np.ndarray:
    """[lanes, width / grain] grains that accesses touch."""
    return offsets[:, None] // grain + np.arange(width // grain)


def _span(array: np.ndarray) -> tuple[int, int]:
    """First byte of an array and the byte past its last."""
    start = array.__array_interface__["data"][0]
    if array.size == 0:
        return start, start
    reach = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    if any(stride < 0 for stride in array.strides):
        raise ValueError(f"an array of strides {array.strides}: takes none that are negative")
    return start, start + reach + array.itemsize


class GlobalMemory:
    """The arrays of a launch, copied between red zones, and copied back after it.

    Arrays may overlap, as views of one tensor do. Only their elements may be touched, not what lies between them.
    """

    def __init__(self, arrays: dict[str, np.ndarray], grain: int, counts: Counts) -> None:
        self.grain, self.counts, self.arrays = grain, counts, arrays
        spans = sorted((*_span(array), name) for name, array in arrays.items())
        merged: list[list] = []  # start, end, names, offset in the arena
        for start, end, name in spans:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
                merged[-1][2].append(name)
            else:
                merged.append([start, end, [name], 0])
        size = RED_ZONE
        for piece in merged:
            piece[3] = size + (piece[0] - size) % ALIGNED
            size = piece[3] + (piece[1] - piece[0]) + RED_ZONE
        self.bytes = np.full(-(-size // SECTOR) * SECTOR, 0xEE, np.uint8)
        self.words = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}
        inside = np.zeros(self.bytes.size, bool)
        self.addresses: dict[str, int] = {}
        self._views: dict[str, np.ndarray] = {}
        self.pieces: list[tuple[int, int, str]] = []
        for start, end, names, at in merged:
            self.pieces.append((at, at + end - start, " or ".join(sorted(names))))
            for name in names:
                array = arrays[name]
                offset = at + _span(array)[0] - start
                self.addresses[name] = BASE + offset
                view = np.ndarray(array.shape, array.dtype, self.bytes, offset, array.strides)
                view[...] = array
                self._views[name] = view
                np.ndarray((*array.shape, array.itemsize), bool, inside, offset, (*array.strides, 1))[...] = True
        self.valid = inside.reshape(-1, grain).all(axis=1)
        self.watch = Watch(len(self.valid))
        self.stored_by = np.full(len(self.valid), -1, np.int32)
        self.loaded_by = np.full(len(self.valid), -1, np.int32)  # -2 for several CTAs
        self.added_to = np.zeros(len(self.valid), bool)
        self.constant = np.zeros(len(self.valid), bool)
        self.touched = {
            "load": np.zeros(self.bytes.size // SECTOR, bool),
            "store": np.zeros(self.bytes.size // SECTOR, bool),
        }
        self.ever = {kind: np.zeros(self.bytes.size // SECTOR, bool) for kind in self.touched}
        self.cta = 0

    def begin(self, cta: int, threads: int) -> None:
        """A CTA begins."""
        self.cta = cta
        self.watch.begin(threads)

    def end(self) -> None:
        """A CTA has ended: its distinct sectors are counted."""
        for kind, into in (("load", self.counts.loaded), ("store", self.counts.stored)):
            sectors = np.flatnonzero(self.touched[kind])
            if len(sectors):
                self.counts.distinct += int(np.count_nonzero(~self.ever[kind][sectors])) * SECTOR
                self.ever[kind][sectors] = True
                for start, end, name in self.pieces:
                    low, high = np.searchsorted(sectors, (start // SECTOR, -(-end // SECTOR)))
                    if high > low:
                        into[name] += int(high - low) * SECTOR
                self.touched[kind][sectors] = False

    def write_back(self) -> None:
        """Copies what was stored to the arrays."""
        for name, array in self.arrays.items():
            if array.flags.writeable:
                array[...] = self._views[name]

    def _place(self, grains: np.ndarray, threads: np.ndarray, races: np.ndarray) -> str:
        """Where the first of several accesses went, for messages."""
        first = int(np.flatnonzero(races)[0])
        offset = int(grains[first]) * self.grain
        start, _, name = next(p for p in self.pieces if p[0] - self.grain < offset < p[1])
        return f"byte {offset - start} of `{name}`, thread {int(threads[first])}"

    def _describe(self, offset: int) -> str:
        near = min(self.pieces, key=lambda p: max(p[0] - offset, offset - p[1] + 1, 0), default=None)
        if near is None:
            return "there are no arrays"
        start, end, name = near
        if offset < start:
            return f"{start - offset} bytes before `{name}`"
        if offset >= end:
            return f"{offset - end} bytes past the end of `{name}`"
        return f"byte {offset - start} of `{name}`, between its elements"

    def locate(self, kind: str, addresses: np.ndarray, width: int, mask: np.ndarray | None) -> np.ndarray:
        """Offsets in the arena, 0 for lanes that are off. Faults on what is misaligned or outside every array."""
        offsets = (addresses - np.uint64(BASE)).view(np.int64)
        if mask is not None:
            offsets = np.where(mask, offsets, 0)
        if (offsets % width).any():
            lane = int(np.flatnonzero(offsets % width)[0])
            raise Fault(f"misaligned {kind} of {width} bytes from global memory: thread {lane}")
        last = self.bytes.size - width
        outside = (offsets < 0) | (offsets > last)
        if not outside.any():
            good = self.valid[_grains(offsets, width, self.grain)].all(axis=1)
            outside = ~good if mask is None else ~good & mask
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            raise Fault(
                f"global {kind} out of bounds: {int(outside.sum())} threads, the first is {lane}, "
                f"{self._describe(int(offsets[lane]))}"
            )
        return offsets

    def load(self, addresses: np.ndarray, width: int, mask: np.ndarray | None, thread: np.ndarray) -> np.ndarray:
        """Offsets of loads, which are noted and counted."""
        offsets = self.locate("load", addresses, width, mask)
        count_global(self.counts.loads, offsets, width, mask)
        self._touch("load", offsets, width, mask, thread)
        return offsets

    def load_constant(
        self, addresses: np.ndarray, width: int, mask: np.ndarray | None, thread: np.ndarray
    ) -> np.ndarray:
        """The same, through a cache that does not see the launch's own stores (``.nc``)."""
        offsets = self.load(addresses, width, mask, thread)
        grains = _grains(offsets if mask is None else offsets[mask], width, self.grain)
        who = np.broadcast_to((thread if mask is None else thread[mask])[:, None], grains.shape).ravel()
        grains = grains.ravel()
        self.constant[grains] = True
        stored = self.stored_by[grains] != -1
        if stored.any():
            raise Fault(f"a load with .nc of what the launch stores: {self._place(grains, who, stored)}")
        return offsets

    def store(
        self,
        addresses: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        thread: np.ndarray,
        values: list[np.ndarray],
    ) -> None:
        """Stores the elements of `values`, a register each, one after the other."""
        offsets = self.locate("store", addresses, width, mask)
        count_global(self.counts.stores, offsets, width, mask)
        self._touch("store", offsets, width, mask, thread)
        _write(self.words, offsets, values, mask, "global")

    def add(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Adds atomically, lanes in order; returns what stood there before each."""
        width = values.itemsize
        offsets = self.locate("atomic add", addresses, width, mask)
        lanes = np.arange(len(offsets)) if mask is None else np.flatnonzero(mask)
        count_global(self.counts.stores, offsets, width, mask)
        grains = _grains(offsets[lanes], width, self.grain)
        who = np.broadcast_to(lanes[:, None], grains.shape).ravel()
        ordinary = (self.stored_by[grains] != -1) | (self.loaded_by[grains] != -1)
        if ordinary.any():
            place = self._place(grains.ravel(), who, ordinary.ravel())
            raise Fault(f"race: an atomic add where an ordinary load or store of the same launch goes, too: {place}")
        self.added_to[grains] = True
        self.touched["store"][offsets[lanes] // SECTOR] = True
        words = self.words[width].view(values.dtype)
        before = np.zeros_like(values)
        for lane in lanes:
            at = offsets[lane] // width
            before[lane] = words[at]
            words[at] += values[lane]
        return before

    def _touch(self, kind: str, offsets: np.ndarray, width: int, mask: np.ndarray | None, thread: np.ndarray) -> None:
        if mask is not None:
            offsets, thread = offsets[mask], thread[mask]
        self.touched[kind][offsets // SECTOR] = True
        grains = _grains(offsets, width, self.grain)
        who = np.broadcast_to(thread[:, None], grains.shape).ravel()
        grains = grains.ravel()

        def check(races: np.ndarray, what: str) -> None:
            if races.any():
                raise Fault(f"race: a global {kind} {what}: {self._place(grains, who, races)}")

        check(self.added_to[grains], "where an atomic add of the same launch goes, too")
        other = self.stored_by[grains]
        check((other >= 0) & (other != self.cta), "where another CTA stores")
        if kind == "load":
            races = self.watch.load(grains, who)
            check(races, "of what another thread of the CTA stored, with no barrier between")
            before = self.loaded_by[grains]
            self.loaded_by[grains] = np.where((before == -1) | (before == self.cta), self.cta, -2)
            return
        other = self.loaded_by[grains]
        check((other != -1) & (other != self.cta), "where another CTA loads")
        check(self.constant[grains], "of what the launch loads with .nc")
        races = self.watch.store(grains, who)
        check(races, "where another thread of the CTA loads or stores, with no barrier between")
        self.stored_by[grains] = self.cta


def _write(
    words: dict[int, np.ndarray], offsets: np.ndarray, values: list[np.ndarray], mask: np.ndarray | None, where: str
) -> None:
    width = values[0].itemsize
    at = offsets // width
    if mask is not None:
        at = at[mask]
        values = [value[mask] for value in values]
    _check_same(at, values, f"{where} store")
    for k, value in enumerate(values):
        words[width][at + k] = value


def _check_same(at: np.ndarray, values: list[np.ndarray], what: str) -> None:
    """Faults where lanes of one instruction write different values to one address."""
    order = np.argsort(at, kind="stable")
    twice = at[order][1:] == at[order][:-1]
    if twice.any() and any((twice & (value[order][1:] != value[order][:-1])).any() for value in values):
        raise Fault(f"race: two threads of one {what} write different values to one address")


class SharedMemory:
    """The shared memory of one CTA, with copies that are still in flight.

    A word that ``cp.async`` writes belongs to nobody until the thread that issued the copy has waited for its group;
    from then on it counts as stored by that thread, so that others see it after a barrier. A word that ``wgmma`` reads
    may not be stored to until its group has been waited for.
    """

    def __init__(self, size: int, grain: int, counts: Counts) -> None:
        self.size, self.grain, self.counts = size, grain, counts
        padded = -(-size // 16) * 16 + 16
        self.bytes = np.full(padded, 0xEE, np.uint8)
        self.words = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}
        grains = padded // grain
        self.watch = Watch(grains)
        self.in_flight = np.zeros(grains, bool)
        self.operand = np.zeros(grains, np.int32)  # unfinished wgmma that read the grain
        self.unfenced = np.full(grains, -1, np.int32)  # thread whose store the async proxy does not see yet
        self.written = np.zeros(grains, bool)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # thread, group, offset, data
        self.groups = np.zeros(0, np.int64)

    def begin(self, threads: int) -> None:
        """A CTA begins: nothing in it is defined."""
        self.watch.begin(threads)
        self.bytes[:] = 0xEE
        self.written[:] = False
        self.in_flight[:] = False
        self.operand[:] = 0
        self.unfenced[:] = -1
        self.copies.clear()
        self.groups = np.zeros(threads, np.int64)

    def locate(self, kind: str, addresses: np.ndarray, width: int, mask: np.ndarray | None) -> np.ndarray:
        """Offsets, 0 for lanes that are off. Faults on what is misaligned or out of bounds."""
        offsets = addresses.astype(np.int64)
        if mask is not None:
            offsets = np.where(mask, offsets, 0)
        if (offsets % width).any():
            lane = int(np.flatnonzero(offsets % width)[0])
            raise Fault(f"misaligned {kind} of {width} bytes of shared memory: thread {lane}")
        outside = (offsets < 0) | (offsets + width > self.size)
        if mask is not None:
            outside &= mask
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            raise Fault(f"shared {kind} out of bounds: thread {lane} at byte {int(offsets[lane])} of {self.size}")
        return offsets

    def _lanes(
        self, offsets: np.ndarray, width: int, mask: np.ndarray | None, thread: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Grains, and the thread of each."""
        if mask is not None:
            offsets, thread = offsets[mask], thread[mask]
        grains = _grains(offsets, width, self.grain)
        return grains.ravel(), np.broadcast_to(thread[:, None], grains.shape).ravel()

    def _check(self, bad: np.ndarray, grains: np.ndarray, who: np.ndarray | None, what: str) -> None:
        """Faults, naming the first place that is bad."""
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            thread = "" if who is None else f", thread {int(who[first])}"
            raise Fault(f"{what}: byte {int(grains[first]) * self.grain}{thread}")

    def _check_readable(self, grains: np.ndarray, who: np.ndarray | None, what: str) -> None:
        self._check(
            self.in_flight[grains], grains, who, f"{what} of shared memory that cp.async has not been waited for"
        )
        self._check(~self.written[grains], grains, who, f"{what} of shared memory that nobody has written")

    def load(self, addresses: np.ndarray, width: int, mask: np.ndarray | None, thread: np.ndarray) -> np.ndarray:
        """Offsets of loads, which are noted and counted."""
        offsets = self.locate("load", addresses, width, mask)
        count_shared(self.counts.shared_loads, offsets, width, mask)
        grains, who = self._lanes(offsets, width, mask, thread)
        self._check_readable(grains, who, "load")
        races = self.watch.load(grains, who)
        self._check(races, grains, who, "race: a shared load of what another thread stored, with no barrier between")
        return offsets

    def load_matrix_rows(self, addresses: np.ndarray, active: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Offsets of the 16-byte rows of ldmatrix, each read for all lanes of its warp."""
        mask = None if active.all() else active
        offsets = self.locate("load", addresses, 16, mask)
        count_shared(self.counts.shared_loads, offsets, 16, mask)
        grains, who = self._lanes(offsets, 16, mask, thread)
        self._check_readable(grains, who, "ldmatrix")
        races = self.watch.load_by_many(grains, who)
        self._check(races, grains, who, "race: ldmatrix of what another thread stored, with no barrier between")
        return offsets

    def _claim(self, offsets: np.ndarray, width: int, mask: np.ndarray | None, thread: np.ndarray) -> np.ndarray:
        grains, who = self._lanes(offsets, width, mask, thread)
        what = "a store to shared memory that cp.async has not been waited for"
        self._check(self.in_flight[grains], grains, who, what)
        what = "a store to an operand of a wgmma that has not been waited for"
        self._check(self.operand[grains] > 0, grains, who, what)
        what = "race: a shared store where another thread loads or stores, with no barrier between"
        self._check(self.watch.store(grains, who), grains, who, what)
        self.written[grains] = True
        return grains

    def store(
        self,
        addresses: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        thread: np.ndarray,
        values: list[np.ndarray],
    ) -> None:
        """Stores the elements of `values`, a register each, one after the other."""
        offsets = self.locate("store", addresses, width, mask)
        count_shared(self.counts.shared_stores, offsets, width, mask)
        grains = self._claim(offsets, width, mask, thread)
        who = thread if mask is None else thread[mask]
        self.unfenced[grains] = np.repeat(who, width // self.grain)
        _write(self.words, offsets, values, mask, "shared")

    def store_matrix_rows(
        self, addresses: np.ndarray, active: np.ndarray, thread: np.ndarray, values: list[np.ndarray]
    ) -> None:
        """Stores the 16-byte rows of stmatrix, each of which four lanes of the warp have a part of."""
        mask = None if active.all() else active
        self.store(addresses, 16, mask, thread, values)
        grains, who = self._lanes(addresses.astype(np.int64), 16, mask, thread)
        self.watch.store_by_many(grains, who)

    def copy_async(self, addresses: np.ndarray, data: np.ndarray, mask: np.ndarray | None, thread: np.ndarray) -> None:
        """Starts copies of the rows of `data` (uint8), one for each thread."""
        width = data.shape[1]
        offsets = self.locate("cp.async", addresses, width, mask)
        count_shared(self.counts.shared_stores, offsets, width, mask)
        grains = self._claim(offsets, width, mask, thread)
        self.in_flight[grains] = True
        lanes = np.arange(len(offsets)) if mask is None else np.flatnonzero(mask)
        _check_same(offsets[lanes], list(np.ascontiguousarray(data[lanes]).view(np.uint32).T), "cp.async")
        self.copies.append((thread[lanes], self.groups[thread[lanes]].copy(), offsets[lanes], data[lanes]))

    def commit(self, mask: np.ndarray | None) -> None:
        """The copies that a thread started since its last commit become a group."""
        self.groups[... if mask is None else mask] += 1

    def wait(self, pending: int, mask: np.ndarray | None) -> None:
        """Lands the copies of all but the latest `pending` groups of every thread."""
        left = []
        for thread, group, offsets, data in self.copies:
            done = group < self.groups[thread] - pending
            if mask is not None:
                done &= mask[thread]
            if done.any():
                at, landed = offsets[done], data[done]
                self.bytes[at[:, None] + np.arange(data.shape[1])] = landed
                grains = _grains(at, data.shape[1], self.grain)
                self.in_flight[grains] = False
                self.watch.stored[grains] = self.watch.epoch + thread[done][:, None]
                # No fence.proxy.async is asked for: Triton issues none between the wait and the wgmma that reads, nor
                # do CUTLASS's main loops of cp.async and wgmma, and both work on devices.
            if not done.all():
                left.append((thread[~done], group[~done], offsets[~done], data[~done]))
        self.copies = left

    def read_operand(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """16-bit elements that wgmma reads at `offsets`, and their grains, which stay claimed until `release`."""
        if (offsets < 0).any() or (offsets + 2 > self.size).any():
            raise Fault("an operand of wgmma lies outside shared memory")
        grains = np.unique(offsets // self.grain)
        self._check_readable(grains, None, "wgmma")
        races = self.watch.load_by_many(grains, None)
        self._check(races, grains, None, "race: wgmma reads what a thread stored, with no barrier between")
        unfenced = self.unfenced[grains] >= 0
        self._check(unfenced, grains, None, "wgmma reads what a thread stored, with no fence.proxy.async between")
        self.operand[grains] += 1
        self.counts.operand_bytes += 2 * offsets.size
        return self.words[2][offsets // 2], grains

    def release(self, grains: np.ndarray) -> None:
        """A wgmma has been waited for: other warps may store to its operands after the next barrier."""
        self.operand[grains] -= 1
        self.watch.load_by_many(grains, None)

    def fence_async_proxy(self, mask: np.ndarray | None) -> None:
        """Stores of the threads become visible to wgmma."""
        if mask is None:
            self.unfenced[:] = -1
        else:
            self.unfenced[(self.unfenced >= 0) & mask[np.maximum(self.unfenced, 0)]] = -1


Locate = Callable[[np.ndarray, int, np.ndarray | None, np.ndarray], np.ndarray]
