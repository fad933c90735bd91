"""The benchmark of the ops: what it holds to be the least traffic, and that a wrong result prints no time."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

import lemur_fast as lf
from benchmarks import ops

SMALL = {case.name: case for case in (make() for make in ops.CASES["small"])}


def tiny(name: str, **changes) -> ops.Case:
    """A case of 32 rows."""
    return ops.Case(**{**vars(SMALL[name]), "rows": 32, **changes})


@pytest.mark.parametrize("name", SMALL)
def test_least_traffic_is_every_tensor_once(name):
    """Counted from the tensors themselves, but for the sides: weights, tables, labels, losses."""
    case = SMALL[name]
    inputs = case.make(case.rows)
    outputs = ops._list(case.ours(*inputs))
    large = [x for x in inputs if x.is_floating_point() and x.numel() >= case.rows * 512]
    produced = [x for x in outputs if x.dim() > 1]
    assert case.forward == sum(x.numel() for x in (*large, *produced))
    # The gradient of the residual is that of x, and rotary reads no input again.
    gradients = [inputs[i] for i in case.wanted if inputs[i].dim() > 1][: 1 if "residual" in name else None]
    saved = [] if name == "rotary" else produced[1:] if "residual" in name else large
    assert case.backward == sum(x.numel() for x in (*produced, *saved, *gradients))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stock_and_ours_pass_the_check(name, dtype):
    case = tiny(name)
    assert ops.check(case, "lemur_fast", case.ours, dtype) == ""
    assert ops.check(case, "eager", case.stock, dtype) == ""


def test_a_wrong_output_and_a_wrong_gradient_are_seen():
    case = tiny("swiglu")
    assert "result 0" in ops.check(case, "wrong", lambda gate, up: 1.1 * lf.ops.swiglu(gate, up), "bfloat16")
    half = lambda gate, up: lf.ops.swiglu(gate, up.detach() / 2 + up / 2)  # noqa: E731
    assert "result 2" in ops.check(case, "wrong", half, "bfloat16")


def test_a_wrong_rival_prints_no_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = tiny("swiglu", stock=lambda gate, up: torch.nn.functional.silu(gate) * up, ours=lambda gate, up: gate * up)
    arguments = ops.Arguments(rounds=2)
    rows = ops.rows_of(case, *ops.measure(case, arguments), 2)
    assert rows[0]["lemur_fast"].startswith("wrong: relative error")
    assert rows[0]["eager"]["seconds"] > 0
    assert rows[0]["least_bytes"] == 3 * 4096 * 1408 * 2
    console = Console(width=200)
    with console.capture() as captured:
        console.print(ops.table(rows, arguments))
    assert "wrong" in captured.get()


def test_share_is_the_time_of_the_copy_over_that_of_the_op():
    case = tiny("swiglu")
    found = {name: ops.Times([0.5, 0.4, 0.6], [1.0, 2.0, 3.0]) for name in ops.RIVALS}
    forward, backward = ops.rows_of(case, found, {case.forward: 0.25, case.backward: 1.0}, 2)
    assert forward["eager"]["share"] == 0.5
    assert backward["eager"]["share"] == 0.5
    assert backward["copy_bytes_per_second"] == case.backward * 2


def test_only_takes_parts_of_names_and_says_so(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"--only: got \('softmax',\); takes parts of rms_norm, .*cross_entropy"):
        ops.main(ops.Arguments(only=("softmax",)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ops, "keep_freed_memory", lambda: "malloc as it is")  # not for the tests after this one
    monkeypatch.setattr(ops, "CASES", {"small": (lambda: tiny("swiglu"), lambda: tiny("rotary"))})
    ops.main(ops.Arguments(only=("swi",), shapes=("small",), rounds=1, json=tmp_path / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["op"], line["direction"]) for line in lines] == [("swiglu", "forward"), ("swiglu", "backward")]
