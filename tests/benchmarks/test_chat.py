"""The benchmark of chat tuning: its rivals compute one loss, and a wrong one prints no time."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import chat
from benchmarks.chat import FLOOR, FREE, OURS, PADDED, Arguments, judge, table
from benchmarks.harness import Measurement, write_json

EXPECTED = 10.0


def measured(name, *losses):
    return Measurement(name, seconds=[1.0] * len(losses), peak_bytes=10**9, results=list(losses))


def printed(arguments, measurements):
    console = Console(file=io.StringIO(), width=130)
    console.print(table(arguments, measurements, trained=777))
    return {line.split("│")[1].strip(): line for line in console.file.getvalue().splitlines() if "│" in line}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [0.0, EXPECTED * 1.001, float("nan"), float("inf")])
def test_a_wrong_loss_prints_no_time(tmp_path, dtype, wrong):
    """Even where only one of the steps is wrong, and where the others' ratios would have been to it."""
    arguments = Arguments(dtype=dtype)
    measurements = [measured(PADDED, EXPECTED, wrong), measured(OURS, EXPECTED, EXPECTED), measured(FLOOR, None, None)]
    judge(arguments, measurements, EXPECTED)
    bad, good, floor = measurements
    assert bad.error.startswith("wrong loss: ")
    assert (good.error, floor.error) == ("", "")
    rows = printed(arguments, measurements)
    assert "failed" in rows[PADDED]
    assert "777" not in rows[PADDED]
    assert rows[OURS].split("│")[2].strip() == "777"
    assert rows[OURS].split("│")[4].strip() == "-"  # no ratio to what has no time
    header = {"benchmark": "chat", "dtype": dtype, "case": "c", "shape": "s"}
    write_json(tmp_path / "out.jsonl", header, measurements)
    first, second, _ = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["error"].startswith("wrong loss")
    assert (first["median"], second["median"]) == (None, 1.0)


def test_rounding_is_allowed_and_no_more():
    for dtype, allowed in chat.LOSS_TOLERANCE.items():
        for share, fine in ((0.9, True), (1.1, False)):
            m = measured(OURS, EXPECTED * (1 + share * allowed))
            judge(Arguments(dtype=dtype), [m], EXPECTED)
            assert bool(m.seconds) == fine
    failed = Measurement(OURS, error="no such kernel")
    judge(Arguments(), [failed], EXPECTED)
    assert failed.error == "no such kernel"


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    examples = []
    for length in (5, 40, 17, 9):
        ids = rng.integers(5, 32000, length).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return examples


@pytest.mark.parametrize("rival", [PADDED, FREE, OURS])
def test_rivals_compute_the_loss_that_they_are_judged_by(examples, rival):
    arguments = Arguments(seq_len=64, batch=2, layers=1, width=64, dtype="float32")
    expected = chat.expected_loss(arguments, examples)
    right, moved = (chat.RIVALS[rival](arguments, given)() for given in (examples, shifted(examples)))
    measurements = [measured("right", right), measured("moved", moved)]
    judge(arguments, measurements, expected)
    assert [bool(m.seconds) for m in measurements] == [True, False]
    assert expected == pytest.approx(float(torch.tensor(32005.0).log()), rel=0.1)  # of random weights


def shifted(examples):
    """One token more of each conversation is trained on."""
    return [e | {"labels": [-100] * 2 + e["input_ids"][2:]} for e in examples]
