"""The scheduler against small cases worked out by hand, and what programs walk against the kernels themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu_bound import DEVICES, UNITS, cycles
from benchmarks.gpu_schedule import (
    KERNELS,
    ORDERS,
    Model,
    dram_bytes,
    makespan,
    places,
    prices,
    tile_of,
    times_of,
    walks,
)
from benchmarks.gpu_tiles import launch_of
from lemur_fast.kernels.attention import Tile
from tests.conftest import INTERPRETING

compiles = pytest.mark.skipif(INTERPRETING, reason="compiles kernels, which TRITON_INTERPRET=1 prevents")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("costs", "processors", "end"),
    [
        ([], 3, 0),
        ([7], 3, 7),
        ([1, 2, 3, 4, 5], 1, 15),
        ([1, 1, 1, 3], 2, 4),  # the long one last: 1 1, 1 3
        ([3, 1, 1, 1], 2, 3),  # and first
        ([2, 2, 3, 3], 3, 5),  # 3 starts at 2 beside the other 3
        ([5, 0, 0, 4], 2, 5),  # programs that leave at once
    ],
)
def test_one_program_at_a_time(costs, processors, end, shared):
    assert makespan(costs, processors, 1, shared) == end


@pytest.mark.parametrize(
    ("costs", "processors", "shared", "end"),
    [
        ([4], 1, True, 4),  # alone, at full speed
        ([4], 1, False, 8),
        ([1, 3], 1, True, 4),  # the first ends at 2, and the other then has 2 left
        ([1, 3], 1, False, 6),
        ([1, 3, 2], 1, True, 6),  # never idle: the sum
        ([1, 3, 2], 1, False, 6),  # slots end at 6 and at 2 + 4
        ([2, 2, 2], 2, True, 4),  # two on the first processor, one on the second
        ([1, 1, 4], 2, True, 5),  # 1 and 4 share until 2, then 3 are left
    ],
)
def test_two_programs_at_once(costs, processors, shared, end):
    assert makespan(costs, processors, 2, shared) == pytest.approx(end)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_no_order_beats_the_work_and_none_leaves_a_slot_free(slots, shared):
    generator = np.random.default_rng(0)
    costs = generator.exponential(1, 200).tolist()
    span = makespan(costs, 7, slots, shared)
    assert sum(costs) / 7 <= span <= sum(costs) / 7 + slots * max(costs)
    if shared and slots == 1:
        assert span == pytest.approx(makespan(costs, 7, slots, False))


def test_places_are_those_of_the_kernels():
    # Tiles of 4: documents of 5, 0 and 8 tokens begin at tiles 0, 5 // 4 + 1 and 5 // 4 + 2; the tail at 13 // 4 + 3.
    document, first, length = places([5, 0, 8], 4)
    assert document.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert first.tolist() == [0, 4, 0, 0, 4, 8, 0]
    assert length.tolist() == [5, 5, 0, 8, 8, 8, 0]


def test_walks_by_hand():
    tile = Tile(4, 2, 4, 1)
    # In blocks of 2, queries 4-6 of 7 see keys 0-3 whole, 4 and 5, and 6, in part; queries 0-3 see 0-3 in part.
    assert walks("forward", [7], tile).tolist() == [[1, 0, 0, 0], [1, 1, 2, 2], [1, 1, 0, 2]]
    # Keys 0-3: queries 0-3 see some, 4-6 all. Keys 4-6: queries 4 and 5 see some, and 6 all.
    assert walks("dkdv", [7], tile).tolist() == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 0, 0, 0]]


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_prices_foretell_what_another_document_executes(kernel, target):
    price, _ = prices(kernel, target, 64)
    launch = launch_of(kernel, target, 64, torch.bfloat16, 300, True, "causal")
    counted = cycles(launch.arguments["counts"], DEVICES[target])
    foretold = price @ walks(kernel, [300], tile_of(kernel, target, 64)).sum(0)
    units = [counted[unit] * DEVICES[target].processors for unit in UNITS if unit != "dram"]
    assert foretold == pytest.approx(units, rel=0.02)


@compiles
def test_orders():
    model = Model(launch=0, search=0, fetch=0)
    equal = times_of("forward", [128] * 4, "sm_80", 128, 32, 32, model)
    assert equal.programs == 32 * 9
    assert equal.empty == 32 * 5
    # Fewer programs than processors: no order takes longer than the longest program.
    few = times_of("dkdv", [64], "sm_80", 128, 32, 8, model)
    assert dict(zip(ORDERS, few.cycles, strict=True))["planner"] == few.least
    # Head by head, the last head's longest tiles begin when all else is nearly done.
    late = times_of("forward", [4096], "sm_80", 128, 32, 32, model)
    by_name = dict(zip(ORDERS, late.cycles, strict=True))
    assert by_name["present"] > 1.05 * by_name["heads"]
    assert by_name["planner"] >= late.least


@compiles
def test_dram_bytes():
    # One tile of each head: every head's 128 keys and values of 128 once.
    assert dram_bytes("forward", [128], "sm_80", 128, 32, 32, 1) == 32 * 128 * 128 * 2 * 2
    # A group of heads fetches its keys once.
    assert dram_bytes("forward", [128], "sm_80", 128, 32, 8, 8) == 8 * 128 * 128 * 2 * 2
    one_by_one, together = (dram_bytes("forward", [8192], "sm_80", 128, 32, 32, section) for section in (1, 32))
    assert together > 4 * one_by_one
