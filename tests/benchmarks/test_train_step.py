"""The benchmark of the training step: its harness, its batch, its floor, and that a wrong result prints no time."""

from __future__ import annotations

import atexit
import json
import time

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import attention, chat, harness, ops, train_step


def make_sleeper(seconds):
    return lambda: time.sleep(seconds) or seconds


def make_broken():
    raise RuntimeError("no such kernel")


def make_breaking():
    calls = iter((None, None))

    def step():
        if next(calls, "over") == "over":
            raise RuntimeError("broke later")

    return step


def make_allocator(mebibytes):
    return lambda: torch.ones(mebibytes << 18).sum().item()


def make_leaver(path):
    atexit.register(path.touch)
    return lambda: None


def test_rivals_end_by_themselves(tmp_path):
    path = tmp_path / "left"
    harness.in_turns({"leaver": (make_leaver, (path,))}, rounds=1, warmup=0, report=lambda _: None)
    assert path.exists()


def test_rivals_are_timed_in_turns_and_failures_are_kept(tmp_path):
    rivals = {
        "slow": (make_sleeper, (0.05,)),
        "broken": (make_broken, ()),
        "breaking": (make_breaking, ()),
        "large": (make_allocator, (300,)),
        "small": (make_allocator, (1,)),
    }
    told = []
    slow, broken, breaking, large, small = harness.in_turns(rivals, rounds=2, warmup=1, report=told.append)
    assert len(slow.seconds) == 2
    assert slow.median >= 0.05
    assert slow.results == [0.05, 0.05]
    assert "no such kernel" in broken.error
    assert not broken.seconds
    assert "broke later" in breaking.error
    assert not breaking.seconds
    assert 290e6 < large.peak_bytes - small.peak_bytes < 400e6
    assert told[-1] == "round 2 of 2"
    harness.write_json(tmp_path / "out.jsonl", {"benchmark": "sleep", "lengths": [3]}, [slow, broken])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["benchmark"], line["rival"], line["facts"]) for line in lines] == [
        ("sleep", "slow", {"lengths": [3]}),
        ("sleep", "broken", {"lengths": [3]}),
    ]
    assert lines[0]["median"] >= 0.05
    assert "no such kernel" in lines[1]["error"]


@pytest.fixture(scope="module")
def arguments():
    return train_step.Arguments(tokens=256, documents=4, layers=1, width=64, dtype="float32")


@pytest.fixture(scope="module")
def batch(arguments):
    return train_step.real_batch(arguments)


def test_the_batch_is_full_of_real_documents(arguments, batch):
    lengths = batch.cu_seqlens.diff()
    assert 2 <= len(lengths) <= 6
    assert 0.98 * 256 <= int(lengths.sum()) <= 256
    assert int(batch.num_items) == int((lengths - 1).sum())


def test_every_rival_has_the_expected_loss(arguments, batch):
    expected = train_step.expected_loss(arguments, batch)
    assert 10 < expected < 11  # about log(32000)
    for name, (make_step, rest) in train_step.rivals(arguments, batch).items():
        if not train_step.cannot_run(name, torch.device("cpu")) and "compile" not in name and name != train_step.FLOOR:
            step = make_step(*rest)
            for _ in range(2):  # a step changes nothing that the next would see
                assert step() == pytest.approx(expected, rel=1e-5), name


def test_on_a_gpu_ours_and_the_baseline_come_first_and_what_is_compiled_last(arguments, batch):
    order = sorted(train_step.rivals(arguments, batch), key=train_step._turn)
    assert order[:2] == [train_step.BASELINE, "lemur_fast"]
    assert {"HF sdpa + compile", "lemur_fast + compile"} == set(order[-2:])


def test_the_floor_multiplies_what_the_model_multiplies(arguments, batch):
    model = LlamaForCausalLM(train_step.model_config(arguments))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    make_step, rest = train_step.rivals(arguments, batch)[train_step.FLOOR]
    step = make_step(*rest)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == 3 * 2 * 256 * weights


def test_a_wrong_loss_prints_no_time(arguments):
    right = harness.Measurement(train_step.BASELINE, [2.0], 10, [7.0])
    wrong = harness.Measurement("lemur_fast", [1.0], 10, [7.1])
    floor = harness.Measurement(train_step.FLOOR, [0.5], 10, [None])
    console = Console(width=110, record=True)
    console.print(train_step.table(arguments, [right, wrong, floor], expected=7.0))
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if "lemur_fast" in line]
    assert "wrong loss" in line
    assert "256" not in line
    (line,) = [line for line in lines if train_step.BASELINE in line and "7.00000" in line]
    assert "128" in line  # tokens/s
    assert "4.00" in line  # times the floor


@pytest.mark.parametrize("arguments", [train_step.Arguments, chat.Arguments, ops.Arguments, attention.Arguments])
def test_float32_is_the_default_where_bfloat16_is_emulated(arguments, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert arguments().dtype == "float32"
    assert arguments(dtype="bfloat16").dtype == "bfloat16"
    assert "this CPU emulates bfloat16" in harness.machine_and_dtype("float32")
    assert harness.machine_and_dtype("bfloat16") == harness.machine()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert arguments().dtype == "bfloat16"
    assert arguments(dtype="float32").dtype == "float32"
    assert harness.machine_and_dtype("float32") == harness.machine()


def test_bfloat16_is_the_default_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert train_step.Arguments(device="cuda").dtype == "bfloat16"
