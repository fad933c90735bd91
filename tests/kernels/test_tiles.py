"""The tiles of attention: the table's, those that were measured on a device, and how they are measured."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lemur_fast import preferences, tuning
from lemur_fast.kernels import attention as kernels
from lemur_fast.preferences import Table
from tests.conftest import INTERPRETING

CPU = torch.device("cpu")
TILES = {128: ((128, 64, 8, 3), (64, 32, 8, 2), (128, 32, 4, 2))}


def test_measured_tiles_replace_the_tables_where_they_were_measured():
    plain, windowed = kernels.Options(True, 0, 0.0, 1.0), kernels.Options(True, 9, 0.0, 1.0)
    q = torch.empty(1, 1, 128, dtype=torch.bfloat16)
    assert kernels.tiles_for(q, plain, TILES[128]) == kernels.Tiles(*(kernels.Tile(*tile) for tile in TILES[128]))
    for other, options in ((q, windowed), (q, plain._replace(softcap=1.0)), (q.float(), plain)):
        assert kernels.tiles_for(other, options, TILES[128]) == kernels.tiles_for(other, options)


def test_neighbours_are_tiles_that_differ_in_one_number():
    for by_width in kernels.TILES.values():  # those for float32 are not measured
        for tiles in by_width.values():
            for tile in tiles:
                found = list(kernels.neighbours(tile))
                assert 3 <= len(found) == len(set(found)) <= 7
                for other in found:
                    assert sum(a != b for a, b in zip(tile, other, strict=True)) == 1
                    preferences._parse_tiles({"head_dim": 64, "tiles": [list(other[:4])] * 3})


def test_the_triton_backend_hands_measured_tiles_to_the_kernels(monkeypatch):
    attention_op = sys.modules["lemur_fast.ops.attention"]
    seen = []
    monkeypatch.setattr(attention_op, "_forward_kernel", lambda *args: seen.append(args[-1]))
    monkeypatch.setattr(attention_op, "_backward_kernel", lambda *args: seen.append(args[-1]))
    bounds, options = torch.tensor([0, 2], dtype=torch.int32), attention_op.AttentionOptions(True, 0, 0.0, 1.0)
    for head_dim, expected in ((128, TILES[128]), (72, TILES[128]), (64, None)):
        q, lse = torch.zeros(2, 1, head_dim), torch.zeros(1, 2)
        with preferences.using(CPU, Table(tiles=TILES)):
            attention_op._triton_forward(q, q, q, bounds, bounds, options)
            attention_op._triton_backward(q, None, q, q, q, q, lse, bounds, bounds, options)
        assert seen == [expected] * 2
        seen.clear()


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1, which runs the kernels here")
def test_tiles_are_raced_against_their_neighbours(monkeypatch):
    """In Triton's interpreter, with a clock that likes tiles of 32."""
    told: list[str] = []
    monkeypatch.setattr(tuning, "TOKENS", {"medium": 32, "large": 32})
    monkeypatch.setattr(tuning, "HEADS", 1)
    monkeypatch.setattr(tuning, "WIDTH", 64)
    shipped = kernels.Tiles(*[kernels.Tile(64, 64, 8, 2)] * 3)
    monkeypatch.setitem(kernels.TILES["sm_80"], 64, shipped)
    monkeypatch.setattr(kernels, "neighbours", lambda tile: [tile._replace(walked=32), tile._replace(own=48)])

    def time(run: Any, calls: int, device: torch.device) -> float:
        run()
        tiles = preferences.tiles_for(device, 64)
        return 1.0 - 0.1 * sum(tile[1] == 32 for tile in tiles)

    monkeypatch.setattr(tuning, "_time", time)
    tiles, notes = tuning.measure_tiles(64, "float16", CPU, 0.1, told.append)
    assert [text.split()[-1] for text in told] == ["forward", "dkdv", "dq"]
    assert tiles == ((64, 32, 8, 2),) * 3
    assert [note.split(": ")[1].split()[0] for note in notes] == ["forward", "dkdv", "dq"]  # 48 is no power of 2
