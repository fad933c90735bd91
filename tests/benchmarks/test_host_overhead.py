"""The benchmark of the host's time: what it takes a call to pieces by, its bar, and that a wrong result prints none."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from rich.console import Console

import lemur_fast as lf
from benchmarks import host_overhead
from lemur_fast import _compiled

CASES = {case.name: case for case in host_overhead.cases()}


def figures(ours: float, bare: float) -> dict[str, float]:
    """Microseconds of a call that adds up."""
    forward = {"ours": ours, "plain": 5.0, "bare": bare, "choose": 1.0, "operator": 9.0, "body": 4.0, "C++": 1.5}
    return forward | {"ours, backward": 60.0, "plain, backward": 30.0, "bare, backward": 45.0}


def test_every_op_is_there():
    assert {name.split()[0] for name in CASES} == {name for name in lf.ops.__all__ if name.islower()}


@pytest.mark.parametrize("name", CASES)
def test_ours_is_what_plain_torch_computes(name):
    host_overhead.check(CASES[name])


def test_a_wrong_op_is_not_timed():
    case = dataclasses.replace(CASES["swiglu"], ours=lambda gate, up: 1.1 * lf.ops.swiglu(gate, up))
    with pytest.raises(SystemExit, match="swiglu: result 0 differs from plain torch's; nothing was timed"):
        host_overhead.check(case)
    half = dataclasses.replace(case, ours=lambda gate, up: lf.ops.swiglu(gate, up.detach() / 2 + up / 2))
    with pytest.raises(SystemExit, match="swiglu: result 2 differs"):
        host_overhead.check(half)


@pytest.mark.parametrize("name", CASES)
def test_the_bare_operator_has_the_schema_and_the_outputs_of_ours(name):
    case = CASES[name]
    _, arguments = host_overhead.record(case, case.inputs)
    ours, twin = host_overhead.operator_of(case), host_overhead.bare(case)
    assert str(twin._schema) == str(ours._schema).replace("lemur_fast::", "lemur_fast_bare::")
    assert twin is host_overhead.bare(case), "registered once"
    outputs = [out if isinstance(out, tuple) else (out,) for out in (ours(*arguments), twin(*arguments))]
    for a, b in zip(*outputs, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", CASES)
def test_the_bare_gradients_have_the_shapes_of_the_inputs(name):
    case = CASES[name]
    inputs = host_overhead.leaves(case.inputs, case.wanted)
    _, arguments = host_overhead.record(case, inputs)
    wanted = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    assert len(wanted) == len(case.wanted)
    arguments = host_overhead.leaves(arguments, wanted)
    *_, last = host_overhead.forward_backward(host_overhead.bare(case), arguments)()
    assert last.shape == arguments[wanted[-1]].shape


def test_what_is_recorded_makes_the_same_call():
    case = CASES["rms_norm + residual"]
    chosen, arguments = host_overhead.record(case, case.inputs)
    assert chosen.args[0] == "rms_norm"
    y, h, _ = host_overhead.operator_of(case)(*arguments)
    assert all(map(torch.equal, (y, h), case.ours(*case.inputs)))


def test_the_stopwatch_sees_the_calls_of_the_compiled_part():
    stopwatch = host_overhead.Stopwatch(_compiled.C)
    timed = host_overhead.functions(CASES["rotary"], stopwatch)
    assert stopwatch.seconds == 0.0
    start = time.perf_counter()
    timed["watched"]()
    assert 0.0 < stopwatch.seconds < time.perf_counter() - start
    assert _compiled.C is not stopwatch


def test_parts_add_up_to_the_call():
    parts = host_overhead.parts(figures(20.0, 8.5))
    assert parts == {"checks": 10.0, "choose": 1.0, "operator": 5.0, "allocate": 2.5, "C++": 1.5}
    assert tuple(parts) == host_overhead.PARTS


def test_the_bar_is_on_the_difference_to_the_bare_operator():
    found = {"within": figures(20.0, 8.0), "over": figures(20.1, 8.0)}
    assert host_overhead.over_the_bar(found) == ["over: 12.1 us over the bare operator; at most 12"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(host_overhead.table(found))
    row = next(line for line in captured.get().splitlines() if "within" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:6] == ["within", "20.0", "5.0", "8.0", "12.0", "4.0"]
    assert cells[-4:] == ["60.0", "30.0", "45.0", "15.0"]


def test_measure_names_everything_and_leaves_the_collector_as_it_was():
    found = host_overhead.measure(CASES["swiglu"], rounds=3)
    assert {"ours", "plain", "bare", "C++"} <= set(found)
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in found.values())


def test_a_row_has_the_rounds_and_where_the_forward_goes():
    seen = {name: [0.9 * us, us, 1.2 * us] for name, us in figures(20.0, 8.5).items()}
    rows = {(row.rival, row.direction): row for row in host_overhead.rows_of({"op": seen})}
    ours = rows["lemur_fast", "forward"]
    assert ours.median == pytest.approx(20e-6)
    assert ours.spread == pytest.approx(0.15)
    assert ours.facts["checks_us"] == 10.0
    assert rows["bare operator", "forward"].median == pytest.approx(8.5e-6)
    assert rows["plain torch", "both"].spread == pytest.approx(0.15)


@pytest.mark.parametrize(("bar", "status"), [(1e9, 0), (-1e9, 1)])
def test_the_exit_status_tells_of_the_bar(monkeypatch, capsys, bar, status):
    threads = torch.get_num_threads()
    monkeypatch.setattr(host_overhead, "BAR", bar)
    with pytest.raises(SystemExit) as left:
        host_overhead.main(host_overhead.Arguments(only=("swi",), rounds=1))
    torch.set_num_threads(threads)
    assert left.value.code == status
    assert ("BROKEN  swiglu" in capsys.readouterr().out) == bool(status)


def test_only_takes_parts_of_names():
    with pytest.raises(SystemExit, match=r"--only: got \('softmax',\); takes parts of rms_norm, .*cross_entropy"):
        host_overhead.main(host_overhead.Arguments(only=("softmax",)))
