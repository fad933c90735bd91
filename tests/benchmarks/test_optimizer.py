"""The optimizer's benchmark: it counts what a step must move, and tells a wrong step."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import optimizer


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_count_the_traffic_of_every_rival(tmp_path, dtype, capsys):
    arguments = optimizer.Arguments(dtype=dtype, width=64, layers=1, rounds=1, json=tmp_path / "optimizer.jsonl")
    optimizer.main(arguments)
    lines = [json.loads(line) for line in arguments.json.read_text().splitlines()]
    assert [line["rival"] for line in lines] == ["lemur_fast", "torch", "torch, foreach"] * 2
    assert not any(line["error"] for line in lines)
    elements = 2 * 32000 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64
    size = 2 if dtype == "bfloat16" else 4
    assert [line["bytes"] for line in lines] == [3 * elements * size] * 3 + [7 * elements * size] * 3
    assert all(line["share_of_copy"] > 0 for line in lines)
    assert "x its memory traffic" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["step", "norm"])
def test_a_wrong_step_prints_no_time(monkeypatch, tmp_path, capsys, wrong):
    if wrong == "step":
        original = torch.optim.AdamW.step

        def twice(self):
            original(self)
            if self.defaults["fused"]:
                original(self)

        monkeypatch.setattr(torch.optim.AdamW, "step", twice)
    else:
        clip = optimizer.clip_gradients
        monkeypatch.setattr(optimizer, "clip_gradients", lambda parameters, longest: clip(parameters, longest) * 1.01)
    arguments = optimizer.Arguments(dtype="float32", width=64, layers=1, rounds=1, json=tmp_path / "optimizer.jsonl")
    optimizer.main(arguments)
    ours = [line for line in map(json.loads, arguments.json.read_text().splitlines()) if line["rival"] == "lemur_fast"]
    assert all(line["median"] is None and line["error"].startswith("wrong: ") for line in ours)
    assert "lemur_fast: wrong: " in capsys.readouterr().out
