"""Orders of backends by class of calls, tuned files, and `python -m lemur_fast tune`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import lemur_fast as lf
from lemur_fast import __main__ as main
from lemur_fast import _devices, dispatch, preferences, tuning
from lemur_fast.preferences import Key, Table

CPU = torch.device("cpu")
TURNED = ("reference", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache of the test's own, and nothing remembered of another's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    preferences.forget()
    torch._dynamo.reset()


def chosen(op="rms_norm", dtype=torch.float32, elements=1, wants_grad=False, **traits):
    return dispatch.choose(op, CPU, dtype, elements, wants_grad, **traits)


# ---- orders ----------------------------------------------------------------------------------------------------------


def test_every_op_has_an_order_that_ends_in_something_that_serves():
    for by_op in preferences.SHIPPED.values():
        assert set(by_op) == set(dispatch._registry)
        for order in by_op.values():
            assert "reference" in order
            assert len(set(order)) == len(order)
            assert set(order) <= set(preferences.BACKENDS)


def test_a_tuned_order_holds_for_its_own_class_of_calls():
    assert preferences.MEDIUM == 2**20
    assert preferences.LARGE == 2**24
    key = Key("rms_norm", "float32", "forward", "medium", None)
    with preferences.using(CPU, Table({key: TURNED})):
        assert [chosen(elements=n) for n in (2**20 - 1, 2**20, 2**24 - 1, 2**24)] == [
            "cpu",
            "reference",
            "reference",
            "cpu",
        ]
        assert chosen(elements=2**20, wants_grad=True) == "cpu"
        assert chosen(elements=2**20, dtype=torch.bfloat16) == "cpu"
        assert chosen("swiglu", elements=2**20) == "cpu"
    assert chosen(elements=2**20) == "cpu"


def test_attention_has_classes_of_head_dimension():
    key = Key("attention", "float32", "training", "large", 128)
    with preferences.using(CPU, Table({key: TURNED})):
        for head_dim, expected in ((1, "cpu"), (64, "cpu"), (65, "reference"), (128, "reference"), (129, "cpu")):
            assert chosen("attention", elements=2**24, wants_grad=True, head_dim=head_dim) == expected
        assert chosen("attention", elements=2**23, wants_grad=True, head_dim=128) == "cpu"


def test_what_the_public_functions_hand_over(monkeypatch):
    """The number of elements of the main input, and whether anything wants a gradient."""
    seen: list[tuple] = []

    def note(op: str, device: Any, dtype: Any, elements: int, wants_grad: bool, **traits: Any) -> str:
        seen.append((op, elements, wants_grad))
        return "reference"

    for module in ("attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "rotary", "swiglu"):
        monkeypatch.setattr(sys.modules[f"lemur_fast.ops.{module}"], "choose", note)
    x, w, bounds = torch.randn(6, 8), torch.randn(8), torch.tensor([0, 6], dtype=torch.int32)
    heads, table, labels = torch.randn(6, 2, 4), torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)

    def calls(grad: bool) -> None:
        leaf = [t.clone().requires_grad_(grad) for t in (x, w, heads)]
        lf.ops.rms_norm(x, leaf[1])
        lf.ops.rms_norm(x, w, residual=leaf[0])
        lf.ops.rotary(heads, leaf[2], table, table)
        lf.ops.swiglu(x, leaf[0])
        lf.ops.attention(heads, heads, leaf[2], bounds)
        lf.ops.cross_entropy(leaf[0], labels)
        lf.ops.linear_cross_entropy(x, leaf[0], labels)

    for grad in (False, True):
        seen.clear()
        calls(grad)
        assert seen == [
            (op, 48, grad)
            for op in ("rms_norm", "rms_norm", "rotary", "swiglu", "attention", "cross_entropy", "linear_cross_entropy")
        ]
    with torch.no_grad():
        seen.clear()
        calls(True)
        assert not any(wanted for _, _, wanted in seen)


@pytest.mark.parametrize(
    ("measured", "result"),
    [
        (("triton", "reference"), ("cuda", "triton", "reference", "varlen", "flash_attn")),
        (("varlen", "triton", "reference"), ("cuda", "varlen", "triton", "reference", "flash_attn")),
        (("reference", "cuda"), ("triton", "reference", "cuda", "varlen", "flash_attn")),
        (("reference",), ("cuda", "triton", "reference", "varlen", "flash_attn")),
    ],
)
def test_what_was_not_measured_keeps_its_rank(measured, result):
    assert preferences.completed(measured, ("cuda", "triton", "reference", "varlen", "flash_attn")) == result


def test_no_guard_on_sizes_where_no_table_tells_them_apart(monkeypatch):
    monkeypatch.setattr(preferences, "MEDIUM", 16)
    monkeypatch.setattr(preferences, "LARGE", 64)
    q, bounds = torch.randn(6, 2, 4), torch.tensor([0, 6], dtype=torch.int32)

    def step(x, weight):
        h = lf.ops.rms_norm(lf.ops.swiglu(x, x), weight)
        rows = h.view(-1, 2, 4)
        return lf.ops.attention(rows, rows, rows, torch.stack((bounds[0], bounds[1] * 0)))

    def graphs() -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
        for rows in (3, 5, 9, 40):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x, torch.ones(8)), step(x, torch.ones(8)))
        return counter.frame_count

    assert q.numel() > 0
    assert graphs() == 1
    key = Key("swiglu", "float32", "forward", "large", None)
    with preferences.using(CPU, Table({key: TURNED})):
        assert graphs() == 2  # below 64 elements and from there on


# ---- files -----------------------------------------------------------------------------------------------------------

NORM = Key("rms_norm", "float32", "forward", "small", None)
TILES = {128: ((128, 64, 8, 3), (64, 32, 8, 2), (128, 32, 4, 2))}


def test_what_is_saved_is_read(cache):
    wide = Key("attention", "bfloat16", "training", "large", 128)
    path = preferences.save(CPU, {NORM: TURNED, wide: TURNED}, TILES)
    assert path.parent == cache / "lemur_fast"
    table = preferences.table_of(CPU)
    assert table.orders == {NORM: TURNED, wide: TURNED}
    assert table.tiles == TILES
    assert chosen() == "reference"
    assert preferences.tiles_for(CPU, 96) == TILES[128]
    assert preferences.tiles_for(CPU, 64) is None
    with lf.use_backend("cpu"):
        assert chosen() == "cpu"
    # What is saved later stands beside it, or in its place.
    preferences.save(CPU, {NORM: ("cpu", "reference")}, {})
    assert preferences.table_of(CPU).orders == {NORM: ("cpu", "reference"), wide: TURNED}
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".json"] == [path.name]


def test_every_model_of_device_has_a_file_of_its_own(monkeypatch):
    gpus = ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[device.index])
    order = ("reference", "triton", "cuda")
    path = preferences.save(torch.device("cuda:0"), {NORM: order}, {})
    assert path.name == "cuda-nvidia-h100-80gb-hbm3.json"
    by_device = [preferences.orders_for("rms_norm", torch.device("cuda", i), torch.float32, False) for i in range(3)]
    assert [preferences.pick(orders, 1, {}) for orders in by_device] == [order, preferences._GPU, order]
    assert preferences.pick(preferences.orders_for("rms_norm", CPU, torch.float32, False), 1, {})[0] == "cpu"


def test_a_device_that_is_not_here_has_the_shipped_order():
    assert preferences.table_of(torch.device("cuda:7")) == Table()
    assert preferences.table_of(torch.device("meta")) == Table()
    with pytest.raises(ValueError, match="device: got cuda:7, which this machine does not have"):
        preferences.save(torch.device("cuda:7"), {}, {})


def broken(**changes: Any) -> str:
    """The text of a good file, but for some entries."""
    path = preferences.save(CPU, {NORM: TURNED}, TILES)
    return json.dumps(json.loads(path.read_text()) | changes)


def entry(**changes: Any) -> list[dict[str, Any]]:
    return [NORM._asdict() | {"order": ["cpu"]} | changes]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (None, r"it is broken \(Expecting"),
        ({"format": 99}, r"it is broken \(format 99, not 1\)"),
        ({"orders": entry(op="conv")}, r"it is broken \(op 'conv'\)"),
        ({"orders": entry(dtype="int8")}, "dtype 'int8'"),
        ({"orders": entry(direction="backward")}, "direction 'backward'"),
        ({"orders": entry(size="huge")}, "size 'huge'"),
        ({"orders": entry(head_dim=64)}, "head_dim 64"),
        ({"orders": entry(order=["gpu"])}, r"order \['gpu'\]"),
        ({"orders": entry(order=[])}, r"order \[\]"),
        ({"orders": entry(order=["cpu", "cpu"])}, r"order \['cpu', 'cpu'\]"),
        ({"orders": [3]}, "entry 3"),
        ({"orders": None}, "orders is no list"),
        ({"date": 3}, "date 3"),
        ({"tiles": [{"head_dim": 128, "tiles": [[128, 64, 8, 3]]}]}, "tiles {"),
        ({"tiles": [{"head_dim": 128, "tiles": [[100, 64, 8, 3]] * 3}]}, r"tile \[100, 64, 8, 3\]"),
        ({"versions": {"torch": "2.0"}}, r"it was measured with .*2\.0.*, and this is .*lemur_fast"),
    ],
    ids=str,
)
def test_a_file_that_does_not_hold_is_ignored_with_one_warning(changes, reason):
    text = "{" if changes is None else broken(**changes)
    path = preferences.path_of(CPU, _devices.cpu_model())
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    forget()
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        backends = chosen(), chosen("swiglu")
    assert backends == ("cpu", "cpu")
    (warning,) = caught
    assert str(path) in str(warning.message)
    assert "Tune again: python -m lemur_fast tune --device cpu" in str(warning.message)
    # Tuning again replaces it.
    preferences.save(CPU, {NORM: TURNED}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "reference"


def test_brackets_without_end_are_a_broken_file():
    path = preferences.path_of(CPU, _devices.cpu_model())
    path.parent.mkdir()
    path.write_text("[" * 200_000)
    with pytest.warns(RuntimeWarning, match=r"json is ignored: it is broken \(maximum recursion"):
        assert chosen() == "cpu"
    preferences.save(CPU, {NORM: TURNED}, {})
    assert chosen() == "reference"


@pytest.fixture
def homeless(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_directory_the_shipped_order_serves(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"~/.cache/lemur_fast is ignored: there is no home directory; set XDG_"):
        assert chosen() == "cpu"
    with pytest.raises(OSError, match="there is no home directory"):
        preferences.save(CPU, {NORM: TURNED}, {})
    assert not list(tmp_path.iterdir())  # no folder of the name ~
    main.main([])


def test_without_fcntl_all_but_writing_works(monkeypatch):
    code = "import sys, torch; sys.modules['fcntl'] = None; import lemur_fast; lemur_fast.explain('cpu')"
    result = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match="this system has no fcntl"):
        preferences.save(CPU, {NORM: TURNED}, {})


def test_writers_at_the_same_time_lose_nothing_of_each_other():
    keys = [Key(op, dtype, "forward", "small", None) for op in ("rms_norm", "swiglu") for dtype in preferences.DTYPES]
    start = threading.Barrier(len(keys))

    def write(key: Key) -> None:
        start.wait()
        for _ in range(5):
            preferences.save(CPU, {key: TURNED}, {})

    threads = [threading.Thread(target=write, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forget()
    assert preferences.table_of(CPU).orders == dict.fromkeys(keys, TURNED)
    assert not [file for file in preferences.folder().iterdir() if "partial" in file.name]


def test_explain_shows_the_table_and_where_classes_differ():
    assert "order of backends: shipped with lemur_fast" in dispatch.explanation("cpu")
    heads = Key("attention", "bfloat16", "training", "small", 64)
    sizes = [Key("swiglu", "bfloat16", direction, "large", None) for direction in preferences.DIRECTIONS]
    path = preferences.save(CPU, dict.fromkeys([heads, *sizes], TURNED), {})
    lines = dispatch.explanation("cpu").splitlines()
    assert "order of backends: tuned 2" in lines[0]
    assert f"on {_devices.cpu_model()} ({path})" in lines[0]

    def classes(op: str) -> list[list[str]]:
        at = next(i for i, line in enumerate(lines) if line.split()[0] == op)
        if "->" in lines[at]:
            return [lines[at].split()[:3]]
        found = []
        for line in lines[at + 1 :]:
            if not line.startswith("    "):
                break
            found.append(line.split("[")[0].replace("->", ",").split(","))
        return [[part.strip() for part in parts] for parts in found]

    assert classes("rms_norm") == [["rms_norm", "->", "cpu"]]
    assert classes("swiglu") == [["small", "cpu"], ["medium", "cpu"], ["large", "reference"]]
    assert classes("attention") == [
        ["forward", "cpu"],
        ["training", "small", "head_dim <= 64", "reference"],
        ["training", "medium", "head_dim <= 64", "cpu"],
        ["training", "large", "head_dim <= 64", "cpu"],
        ["training", "head_dim <= 128", "cpu"],
        ["training", "head_dim <= 256", "cpu"],
    ]


# ---- races -----------------------------------------------------------------------------------------------------------


def runner(*seconds: float, failure: str = "", refused: bool = False) -> tuning.Runner:
    return tuning.Runner(contextlib.nullcontext, list(seconds), failure, refused)


def test_the_shipped_order_stands_unless_another_is_faster_by_more_than_the_noise():
    steady, slower, faster = runner(1.0, 1.0, 1.0), runner(1.01, 1.01, 1.01), runner(0.9, 0.9, 0.9)
    assert tuning.ranked({"a": steady, "b": faster}) == ("b", "a")
    assert tuning.ranked({"a": slower, "b": steady}) == ("a", "b")  # 1% is nothing, however steady
    noisy = runner(0.5, 0.9, 1.3, 0.7, 1.1)
    assert tuning.ranked({"a": steady, "b": noisy}) == ("a", "b")
    assert tuning.ranked({"a": runner(3.0), "b": steady, "c": faster}) == ("c", "b", "a")
    failed, refused = runner(failure="bad"), runner(failure="no", refused=True)
    assert tuning.ranked({"a": failed, "b": refused, "c": steady}) == ("c", "a")


def scripted(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float]) -> dict[str, list[int]]:
    """Replaces the clock: a call takes what `speeds` says of its backend. Returns the calls timed together."""
    rounds: dict[str, list[int]] = {}

    def time(run: Any, calls: int, device: torch.device) -> float:
        (name,) = dispatch._requested
        rounds.setdefault(name, []).append(calls)
        return speeds[name]

    monkeypatch.setattr(tuning, "_time", time)
    monkeypatch.setattr(tuning, "TOKENS", {"small": 2, "medium": 3, "large": 4})
    return rounds


def test_a_race_ranks_by_time_and_spends_its_budget_evenly(monkeypatch):
    rounds = scripted(monkeypatch, {"cpu": 0.002, "reference": 0.001})
    result = tuning.measure(Key("swiglu", "float32", "training", "small", None), CPU, 0.75)
    assert result.order == ("reference", "cpu")
    assert result.shipped == ("cpu", "reference")
    assert result.microseconds == pytest.approx({"cpu": 2000, "reference": 1000})
    assert result.notes == []
    assert rounds == {"cpu": [1] * 3 + [53] * 7, "reference": [1] * 3 + [107] * 7}


def test_the_hopeless_are_timed_no_further_and_slow_ones_seldom(monkeypatch):
    rounds = scripted(monkeypatch, {"cpu": 0.3, "reference": 1.0})
    key = Key("swiglu", "float32", "forward", "small", None)
    result = tuning.measure(key, CPU, 0.1)
    assert result.order == ("cpu", "reference")
    assert result.microseconds == pytest.approx({"cpu": 3e5, "reference": 1e6})
    assert rounds == {"cpu": [1] * 2, "reference": [1]}
    rounds.clear()
    tuning.measure(key, CPU, 0.3)
    assert rounds == {"cpu": [1] * (3 + 3), "reference": [1]}
    # A GPU's calls are short: those of four budgets are worth three rounds.
    monkeypatch.setitem(tuning.SLOW, "cpu", tuning.SLOW["cuda"])
    rounds.clear()
    tuning.measure(key, CPU, 0.1)
    assert rounds == {"cpu": [1] * (3 + 3), "reference": [1]}


def test_a_first_call_that_compiles_is_not_held_against_a_backend(monkeypatch):
    """The first call alone takes minutes; each after it half of what the reference takes."""
    now, current, seen = 0.0, "", set()

    @contextlib.contextmanager
    def ready(name: str) -> Any:
        nonlocal current
        current = name
        yield

    def run() -> list[torch.Tensor]:
        nonlocal now
        compiles = current == "triton" and current not in seen
        seen.add(current)
        now += 300.0 if compiles else {"triton": 0.001, "reference": 0.002}[current]
        return [torch.ones(3)]

    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now)
    runners = {name: tuning.Runner(lambda name=name: ready(name)) for name in ("reference", "triton")}
    tuning.race(run, runners, device=CPU, seconds=0.5, tolerance=1e-3, reference="reference")
    assert tuning.ranked(runners) == ("triton", "reference")
    assert runners["triton"].seconds == pytest.approx([0.001] * tuning.ROUNDS)


@pytest.mark.parametrize(
    ("forward", "note"),
    [
        (lambda gate, up: gate / 0 * 0, "cpu: differs from the reference: relative error nan in result 0"),
        (lambda gate, up: gate + up, "cpu: differs from the reference: relative error"),
        (None, "swiglu, float32, small, forward: cpu: OSError: no such luck"),
    ],
)
def test_a_backend_that_fails_or_is_wrong_goes_last_and_is_reported(monkeypatch, forward, note):
    def fail(*_: Any) -> Any:
        raise OSError("no such luck\nat all")

    scripted(monkeypatch, {"cpu": 0.001, "reference": 0.002})
    monkeypatch.setitem(dispatch._registry["swiglu"]["cpu"].functions, "forward", forward or fail)
    result = tuning.measure(Key("swiglu", "float32", "forward", "small", None), CPU, 0.1)
    assert result.order == ("reference", "cpu")
    assert list(result.microseconds) == ["reference"]
    (only,) = result.notes
    assert note in only


def test_a_backend_that_refuses_is_no_part_of_the_order(monkeypatch):
    scripted(monkeypatch, {"reference": 0.002})
    refuses = dispatch.Backend(lambda *_, **__: "out of order", {})
    monkeypatch.setitem(dispatch._registry["swiglu"], "cpu", refuses)
    result = tuning.measure(Key("swiglu", "float32", "forward", "small", None), CPU, 0.1)
    assert result.order == result.shipped == ("reference",)
    assert result.notes == [
        "swiglu on cpu in torch.float32: no backend of those asked for can serve it (cpu: out of order)"
    ]


@pytest.mark.parametrize("op", preferences.OPS)
@pytest.mark.parametrize("direction", preferences.DIRECTIONS)
def test_every_op_is_called_with_its_gradients(monkeypatch, op, direction):
    monkeypatch.setattr(tuning, "TOKENS", dict.fromkeys(preferences.SIZES, 16))
    monkeypatch.setattr(tuning, "ROWS_OF_LOGITS", dict.fromkeys(preferences.SIZES, 2))
    monkeypatch.setattr(tuning, "VOCABULARY", 32)
    sizes = {"rms_norm": (2, 3), "rotary": (2, 2), "swiglu": (1, 2), "attention": (1, 3), "cross_entropy": (1, 1)}
    outputs, gradients = sizes.get(op, (1, 2))
    (key, *_) = [key for key in tuning.keys([op], ["bfloat16"]) if key.direction == direction]
    with lf.use_backend("reference"):
        results = tuning._prepared(key, CPU)()
    assert len(results) == outputs + (gradients if direction == "training" else 0)
    assert all(x.isfinite().all() and not x.requires_grad for x in results)


def test_sizes_stand_for_their_classes():
    """The main input of what is timed has as many elements as its class is for."""
    for op, size, on_cpu in itertools.product(preferences.OPS, preferences.SIZES, (False, True)):
        with FakeTensorMode():
            first = tuning.CALLS[op](size, 128, on_cpu).inputs[0]
        orders = (tuple((name,) for name in preferences.SIZES),)
        assert preferences.pick(orders, first.numel(), {}) == (size,), op
        # On a CPU, where the elements are the time, a large call has hardly more than make it large.
        if on_cpu and size == "large":
            assert first.numel() < 1.02 * preferences.LARGE, op


def test_documents_of_attention_cover_its_tokens():
    for size, on_cpu, longest in (("large", False, 2048), ("large", True, 512), ("small", True, 32)):
        bounds = tuning.CALLS["attention"](size, 128, on_cpu).inputs[3]
        lengths = bounds.diff()
        assert bounds[0] == 0
        assert bounds[-1] == tuning.TOKENS[size]
        assert lengths.min() > 0
        assert lengths.max() == longest


# ---- the command -----------------------------------------------------------------------------------------------------


def test_tune_measures_and_is_believed(monkeypatch, capsys, cache):
    scripted(monkeypatch, {"cpu": 0.003, "reference": 0.001})
    main.main(["tune", "--device", "cpu", "--ops", "swiglu,rms_norm", "--dtypes", "float32", "--seconds", "0.01"])
    out, err = capsys.readouterr()
    # No terminal here: a line for each race instead of a bar.
    races = err.splitlines()
    assert len(races) == 12
    assert re.fullmatch(r"1/12  rms_norm, float32, small, forward: \d+\.\d s", races[0])
    assert re.search(r"\nTook \d+ min \d+ s\. Kept in ", out)
    assert _devices.cpu_model() in out
    assert "cpu, us  reference, us  order" in out
    row = next(line for line in out.splitlines() if line.startswith("swiglu"))
    assert row.split()[:6] == ["swiglu", "float32", "small", "forward", "3,000.0", "1,000.0"]
    assert row.endswith("reference, cpu  (shipped: cpu, reference)")
    assert "12 of 12 orders differ from those that ship." in out
    assert f"Kept in {cache / 'lemur_fast'}" in out
    assert chosen() == chosen("swiglu") == "reference"
    assert chosen("rotary") == chosen(dtype=torch.bfloat16) == "cpu"


TUNE_ONE = ["tune", "--device", "cpu", "--ops", "swiglu", "--dtypes", "float32", "--seconds", "0.01"]


def test_a_place_that_cannot_be_written_is_reported_before_the_first_race(monkeypatch, cache):
    def never(*_: Any) -> Any:
        raise AssertionError("a race")

    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    monkeypatch.setattr(tuning, "measure", never)
    with pytest.raises(SystemExit) as stop:
        main.main(TUNE_ONE)
    expected = f"python -m lemur_fast tune: nothing can be kept in {cache}/file/lemur_fast: Not a directory"
    assert stop.value.code == expected  # which Python prints, and exits with 1


@pytest.mark.usefixtures("homeless")
def test_tune_without_a_home_directory_says_so():
    with pytest.raises(
        SystemExit, match=r"kept in ~/.cache/lemur_fast: there is no home directory; set XDG_CACHE_HOME"
    ):
        main.main(TUNE_ONE)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, where nobody makes folders")
def test_no_traceback_where_nothing_can_be_written():
    environment = os.environ | {"XDG_CACHE_HOME": "/proc/nowhere"}
    command = [sys.executable, "-m", "lemur_fast", *TUNE_ONE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("python -m lemur_fast tune: nothing can be kept in /proc/nowhere/lemur_fast: ")


def test_results_are_printed_when_they_cannot_be_kept(monkeypatch, capsys, cache):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    scripted(monkeypatch, {"cpu": 0.003, "reference": 0.001})
    monkeypatch.setattr(preferences, "write_json", full)
    with pytest.raises(SystemExit) as stop:
        main.main(TUNE_ONE)
    assert stop.value.code == (
        f"python -m lemur_fast tune: nothing can be kept in {cache}/lemur_fast: No space left on device"
    )
    out = capsys.readouterr().out
    assert "6 of 6 orders differ" in out
    assert "Kept" not in out


def test_a_folder_that_takes_no_new_files_is_found_out(monkeypatch, cache):
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    preferences.check_writable(CPU)
    assert [file.suffix for file in (cache / "lemur_fast").iterdir()] == [".lock"]
    monkeypatch.setattr(preferences.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError):
        preferences.check_writable(CPU)


def test_the_command_from_end_to_end(cache):
    """Nothing replaced: every size of one op, in a process of its own."""
    command = [sys.executable, "-m", "lemur_fast", "tune", "--device", "cpu", "--ops", "rotary", "--seconds", "0.001"]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "of 6 orders differ" in result.stdout
    assert "order of backends: tuned 2" in dispatch.explanation("cpu")
    orders = preferences.table_of(CPU).orders
    assert set(orders) == set(tuning.keys(["rotary"], ["bfloat16"]))
    assert all(set(order) == {"cpu", "reference"} for order in orders.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "mps"], "--device: got 'mps'; takes cpu, cuda, or cuda and a number"),
        (["--device", "gpu0"], "--device: got 'gpu0'; takes cpu, cuda, or cuda and a number"),
        (["--device", "cpu:3"], "--device: got 'cpu:3'; takes cpu, cuda, or cuda and a number"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'; torch finds"),
        (["--ops", "rms_norm,conv"], "--ops: got 'conv'; takes rms_norm, rotary, swiglu, attention"),
        (["--dtypes", "float64"], "--dtypes: got 'float64'; takes float32, bfloat16, float16"),
        (["--seconds", "0"], "--seconds: got '0'; takes a positive number"),
        (["--seconds", "soon"], "--seconds: got 'soon'; takes a positive number"),
        (["--seconds", "inf"], "--seconds: got 'inf'; takes a positive number"),
        (["--size", "3"], "unrecognized arguments: --size 3"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["tune", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    for arguments, words in (
        (["--help"], ("bug report", "tune")),
        (["tune", "--help"], ("--device", "--ops", "lemur_fast")),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main(arguments)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        for word in words:
            assert word in out


def test_without_a_command_it_reports(capsys):
    main.main([])
    out = capsys.readouterr().out
    assert "compiled part" in out
    assert "order of backends: shipped with lemur_fast" in out
