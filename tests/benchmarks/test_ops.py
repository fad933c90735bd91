"""The benchmark of the ops: what it holds to be the least traffic, and that a wrong result prints no time."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

import lemur_fast as lf
from benchmarks import ops, peers

CPU = torch.device("cpu")
SMALL = {case.name: case for case in ops.cases("small", CPU)}
MOVING = [name for name, case in SMALL.items() if not case.flops]
OURS = {name: peers.functions(name, CPU)[0]["lemur_fast"] for name in SMALL}


def tiny(name: str, **changes) -> ops.Case:
    """A case of 32 rows."""
    return ops.Case(**{**vars(SMALL[name]), "rows": 32, **changes})


@pytest.mark.parametrize("name", MOVING)
def test_least_traffic_is_every_tensor_once(name):
    """Counted from the tensors themselves, but for the sides: weights, tables, labels, losses."""
    case = SMALL[name]
    inputs = case.make(case.rows)
    outputs = ops._list(OURS[name](*inputs))
    large = [x for x in inputs if x.is_floating_point() and x.numel() >= case.rows * 512]
    produced = [x for x in outputs if x.dim() > 1]
    assert case.forward == sum(x.numel() for x in (*large, *produced))
    # The gradient of the residual is that of x, and rotary reads no input again.
    gradients = [inputs[i] for i in case.wanted if inputs[i].dim() > 1][: 1 if "residual" in name else None]
    saved = [] if name == "rotary" else produced[1:] if "residual" in name else large
    assert case.backward == sum(x.numel() for x in (*produced, *saved, *gradients))


def test_flops_are_those_of_the_three_products():
    case = SMALL["linear_cross_entropy"]
    hidden, weight, labels = case.make(case.rows)
    assert case.flops == 3 * 2 * hidden.numel() * weight.shape[0]
    assert labels.shape == hidden.shape[:1]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_rival_that_runs_passes_the_check(name, dtype):
    functions, missing = peers.functions(name, CPU)
    assert {"lemur_fast", "eager"} <= set(functions)
    assert set(functions) | set(missing) == set(peers.OPS[name])
    for rival, function in functions.items():
        if rival in ("compile", "CCE"):  # the same formula, after half a minute of compilation
            continue
        assert ops.check(tiny(name), function, dtype, CPU) == "", rival


def test_a_wrong_output_and_a_wrong_gradient_are_seen():
    case = tiny("swiglu")
    assert "result 0" in ops.check(case, lambda gate, up: 1.1 * lf.ops.swiglu(gate, up), "bfloat16", CPU)
    half = lambda gate, up: lf.ops.swiglu(gate, up.detach() / 2 + up / 2)  # noqa: E731
    assert "result 2" in ops.check(case, half, "bfloat16", CPU)


def test_a_rival_that_fails_is_named_and_the_others_are_timed(monkeypatch):
    def breaks(gate, up):
        raise RuntimeError("no kernel image\nand more")

    rivals = {
        "lemur_fast": lambda device: lambda gate, up: gate * up,
        "eager": peers.OPS["swiglu"]["eager"],
        "breaking": lambda device: breaks,
        "Liger": peers.OPS["swiglu"]["Liger"],
    }
    monkeypatch.setitem(peers.OPS, "swiglu", rivals)
    rows = ops.measure(tiny("swiglu"), ops.Arguments(dtype="bfloat16", rounds=3))
    by_rival = {row.rival: row for row in rows if row.direction == "forward"}
    assert by_rival["lemur_fast"].error.startswith("wrong: relative error")
    assert by_rival["lemur_fast"].median is None
    assert by_rival["breaking"].error == "RuntimeError: no kernel image"
    assert by_rival["Liger"].error.endswith("needs a GPU")
    eager = by_rival["eager"]
    assert eager.median > 0
    assert eager.bytes == 3 * 4096 * 1408 * 2
    assert eager.share_of_copy == eager.copy_seconds / eager.median
    both = next(row for row in rows if row.rival == "eager" and row.direction == "both")
    assert both.median > eager.median
    console = Console(width=200)
    with console.capture() as captured:
        console.print(ops.table(rows, ops.Arguments()))
    (line,) = [line for line in captured.get().splitlines() if " forward " in line]
    assert "wrong" in line
    assert ops.errors(rows)[0].startswith("swiglu, 4096 x 1408: lemur_fast: wrong")


def test_a_rival_that_overwrites_its_inputs_spoils_no_other(monkeypatch):
    def in_place(gate, up):
        out = lf.ops.swiglu(gate, up)
        gate.data.fill_(torch.nan)
        return out

    def sees(gate, up):
        assert not gate.isnan().any()
        return lf.ops.swiglu(gate, up)

    rivals = {"eager": peers.OPS["swiglu"]["eager"], "in place": lambda _: in_place, "lemur_fast": lambda _: sees}
    monkeypatch.setitem(peers.OPS, "swiglu", rivals)
    rows = ops.measure(tiny("swiglu"), ops.Arguments(rounds=2))
    assert all(row.median for row in rows if row.rival != "in place"), [row.error for row in rows]


def test_only_takes_parts_of_names_and_says_so(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"--only: got \('softmax',\); takes parts of rms_norm, .*cross_entropy"):
        ops.main(ops.Arguments(only=("softmax",)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ops, "keep_freed_memory", lambda: "malloc as it is")  # not for the tests after this one
    monkeypatch.setattr(ops, "cases", lambda model, device: [tiny("swiglu"), tiny("rotary")])
    ops.main(ops.Arguments(only=("swi",), shapes=("small",), rounds=1, json=tmp_path / "new" / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert {(line["case"], line["direction"]) for line in lines} == {
        ("swiglu", direction) for direction in ("forward", "backward", "both")
    }
    assert {line["rival"] for line in lines} == set(peers.OPS["swiglu"])
