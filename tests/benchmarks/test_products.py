"""The benchmark of linear layers: what it prints, and what it refuses to print."""

import json

import pytest
import torch

from benchmarks import products


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(products, "SHAPES", {"tiny": (70, 16, 24)})


def test_every_rival_has_a_row_in_both_directions(tmp_path, capsys):
    products.main(products.Arguments(shapes=("tiny",), rounds=2, json=tmp_path / "rows.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["rival"], row["direction"]) for row in rows} == {
        (rival, direction) for rival in products.rivals() for direction in ("forward", "backward")
    }
    assert all(row["median"] > 0 and not row["error"] for row in rows)
    flops = {row["direction"]: row["flops"] for row in rows}
    assert flops == {"forward": 2 * 70 * 16 * 24, "backward": 4 * 70 * 16 * 24}
    assert "70 x 16 x 24" in capsys.readouterr().out


def test_a_wrong_result_has_no_time(monkeypatch, capsys):
    real = products.rivals()
    wrong = {"torch": (lambda x, weight: 1.02 * torch.nn.functional.linear(x, weight), torch.bfloat16)}
    monkeypatch.setattr(products, "rivals", lambda: real | wrong)
    products.main(products.Arguments(shapes=("tiny",), rounds=2))
    printed = capsys.readouterr().out
    assert "torch, 70 x 16 x 24, forward: wrong: relative error of y is 2" in printed
    assert [line.split("│")[4].strip() for line in printed.splitlines() if line.startswith("│")] == ["-", "-"]


def test_a_shape_of_another_name_is_refused():
    with pytest.raises(SystemExit, match=r"--shapes: got huge; takes tiny"):
        products.main(products.Arguments(shapes=("huge",)))
