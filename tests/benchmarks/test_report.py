"""Rows, their JSON lines, and the report that is made of them."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from benchmarks import harness, report
from benchmarks.harness import Row

CPU = torch.device("cpu")


def rows():
    def row(rival, *seconds, **rest):
        return Row("ops", "swiglu", rival, "8 x 8", "both", "float32", list(seconds), **rest)

    return [
        row("lemur_fast", 1e-3, 2e-3, 3e-3, bytes=2e6, copy_seconds=1e-3, facts={"fresh_pages": 3.0}),
        row("eager", 8e-3, 8e-3, 9e-3, bytes=2e6, copy_seconds=1e-3),
        row("broken", 1e-9, error="wrong: relative error 1.0e+00 in result 0"),
        row("Liger", error="liger_kernel needs a GPU"),
    ]


def written(tmp_path, some, name="ops.jsonl"):
    harness.write_rows(tmp_path / name, some)
    return tmp_path / name


def test_a_line_tells_time_share_ratio_and_where(tmp_path):
    ours, eager, broken, liger = map(json.loads, written(tmp_path, rows()).read_text().splitlines())
    assert ours["median"] == 2e-3
    assert ours["spread"] == 0.5
    assert ours["share_of_copy"] == 0.5
    assert ours["copy_bytes_per_second"] == 2e9
    assert ours["times_as_fast_as"] == {"eager": 4.0}
    assert eager["times_as_fast_as"] == {"lemur_fast": 0.25}
    assert broken["median"] is None
    assert broken["rounds"] == 0
    assert liger["error"] == "liger_kernel needs a GPU"
    assert ours["versions"]["torch"] == torch.__version__.split("+")[0]
    assert ours["commit"].startswith("commit ") or ours["commit"] == "no commit known"
    assert {"machine", "device", "python", "time"} <= set(ours)


def test_rows_of_other_places_on_a_curve_are_no_rivals(tmp_path):
    some = [Row("scaling", "op", r, at={"tokens": t}, seconds=[t]) for r in ("a", "b") for t in (1.0, 2.0)]
    lines = [json.loads(line) for line in written(tmp_path, some).read_text().splitlines()]
    assert [line["times_as_fast_as"] for line in lines] == [{"b": 1.0}, {"b": 1.0}, {"a": 1.0}, {"a": 1.0}]


def test_phases_are_told_apart_in_turns():
    order = []

    def run(name):
        def phases(mark):
            order.append(name)
            time.sleep(0.002)
            mark()
            time.sleep(0.02)
            mark()

        return phases

    found = harness.phases_in_turns({"a": run("a"), "b": run("b")}, device=CPU, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    first, second = found["a"].seconds
    assert len(first) == len(second) == 3
    assert min(second) >= 0.02 > 0.002 <= min(first)


def test_a_budget_leaves_three_rounds():
    runs = {"a": lambda mark: (time.sleep(0.01), mark())}
    assert len(harness.phases_in_turns(runs, device=CPU, rounds=50, budget=0.01)["a"].seconds[0]) == 3
    assert len(harness.phases_in_turns(runs, device=CPU, rounds=2, budget=0.01)["a"].seconds[0]) == 2


def test_peak_above_counts_what_the_call_held():
    kept = torch.ones(50 << 18)  # 50 MiB, which are no part of the call
    peak = harness.peak_above(lambda: torch.ones(100 << 18).add(1).sum() + kept[0])
    assert 190e6 < peak < 260e6


def test_the_report_shows_times_and_names_those_without(tmp_path):
    out = tmp_path / "docs" / "benchmarks.md"
    written(tmp_path, rows())
    report.main(report.Arguments(results=(tmp_path,), out=out))
    text = out.read_text()
    assert "| lemur_fast | 2 ms | ±50% | 4.00 | 50% of copy | 3 |" in text
    assert "| eager | 8 ms | ±6% | 1.00 | 12% of copy |  |" in text
    assert "swiglu, 8 x 8, both, float32; counted: 2 MB:" in text
    assert "No GPU has been measured" in text
    assert "- broken: wrong: relative error" in text
    assert "- Liger: liger_kernel needs a GPU" in text
    assert "1e-09" not in text
    (picture,) = (tmp_path / "docs" / "benchmarks").iterdir()
    assert f"(benchmarks/{picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_many_cases_make_a_wide_table(tmp_path):
    some = [r for case in ("a", "b", "c") for r in rows() if not setattr(r, "case", case)]
    text = report.report(report.read([written(tmp_path, some)]), tmp_path / "benchmarks.md")
    case = "| a, 8 x 8 | both | float32 | 2 MB |"
    assert f"{case} 2 ms ±50%, 50% of copy | 8 ms ±6%, 12% of copy, x4.00 | 4.00 |" in text


def test_where_nobody_has_a_rival_all_facts_stand_in_one_table(tmp_path):
    some = [
        Row(
            "loader",
            "wait",
            "lemur_fast",
            f"steps of {ms} ms",
            seconds=[ms / 1e4],
            facts={"steps": 5 * ms, "share": 0.5},
        )
        for ms in (1, 10, 100)
    ]
    text = report.report(report.read([written(tmp_path, some)]), tmp_path / "benchmarks.md")
    assert "|  | time | ± | steps | share |" in text
    assert "| wait, steps of 10 ms | 1 ms | once | 50 | 0.5 |" in text
    assert "![" not in text  # bars of one would tell nothing


def test_the_later_of_two_measurements_counts(tmp_path):
    path = written(tmp_path, rows()[:1], "a.jsonl")
    line = json.loads(path.read_text())
    later = line | {"time": "2999-01-01T00:00:00+00:00", "median": 7.0}
    (tmp_path / "b.jsonl").write_text(json.dumps(later) + "\n" + json.dumps(line | {"machine": "another, 8 threads"}))
    lines = report.read([tmp_path])
    assert sorted(line["median"] for line in lines) == [2e-3, 7.0]


def test_exponents_of_growth(tmp_path):
    some = [
        Row("scaling", f"power {p}", "lemur_fast", at={"tokens": t}, seconds=[1e-3 * t**p], peak_bytes=t << 20)
        for p in (0, 1, 2)
        for t in (8, 1, 2, 4)
    ]
    lines = report.read([written(tmp_path, some)])
    found = {curve.case: curve for curve in report.curves(lines)}
    for power in (0, 1, 2):
        curve = found[f"power {power}"]
        assert curve.sizes == [1, 2, 4, 8]
        assert math.isclose(curve.exponent, power, abs_tol=1e-9)
        assert math.isclose(curve.last_step, power, abs_tol=1e-9)
    text = report.report(lines, tmp_path / "benchmarks.md")
    assert (
        "| power 2 |  |  | lemur_fast | tokens 1 to 8 | 1 ms to 64 ms | once | 2.00 | 2.00 | 1 to 8 MB |  |  |" in text
    )


def test_growth_compares_at_the_largest_size_and_keeps_dtypes_apart(tmp_path):
    some = [
        Row("scaling", "op", rival, dtype=dtype, at={"tokens": t}, seconds=[s * t, s * t * 1.2], copy_seconds=s / 2 * t)
        for rival, dtype, s in (("lemur_fast", "float32", 1e-3), ("eager", "float32", 3e-3), ("eager", "float16", 1.0))
        for t in (1, 2)
    ]
    text = report.report(report.read([written(tmp_path, some)]), tmp_path / "benchmarks.md")
    assert (
        "| op |  | float32 | eager | tokens 1 to 2 | 3.3 ms to 6.6 ms | ±9% | 1.00 | 1.00 |  | 45% of copy | 3.00 |"
        in text
    )
    assert (
        "| op |  | float16 | eager | tokens 1 to 2 | 1.1 s to 2.2 s | ±9% | 1.00 | 1.00 |  | 45% of copy |  |" in text
    )


def step(name, *seconds, shape="9 tokens", **rest):
    speed = 9 / sorted(seconds)[len(seconds) // 2]
    facts = {"tokens_per_second": speed}
    return Row("train_step", "LLaMA", name, shape, "step", "bfloat16", list(seconds), facts=facts, **rest)


def elsewhere(path, machine, device="cuda"):
    """The same lines as if they were measured there."""
    lines = [json.loads(line) | {"machine": machine, "device": device} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_headline_goes_between_the_marks_and_leaves_a_gpu_empty(tmp_path):
    written(tmp_path, [step("HF sdpa", 3.0), step("lemur_fast", 0.9, 1.0, 1.3)])
    readme = tmp_path / "README.md"
    arguments = report.Arguments(results=(tmp_path,), out=tmp_path / "docs" / "benchmarks.md", readme=readme)
    readme.write_text(f"before\n{report.BEGIN}\nold\n")
    with pytest.raises(SystemExit, match="must hold"):
        report.main(arguments)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.main(arguments)
        text = readme.read_text()
        assert "old" not in text
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "| **lemur_fast** | 9 ±20% | 3.00 |  |  |  |  |  |" in text
        assert "| HF sdpa | 3 once | 1.00 |  |  |  |  |  |" in text
        assert "GPU: not measured yet; `make gpu-check`" in text
        (legend,) = [line for line in text.splitlines() if line.startswith("CPU (`python -m benchmarks.train_step`)")]
        assert harness.environment()["machine"] in legend
        assert harness.commit() in legend
    assert "](docs/benchmarks/headline.png)" in text
    assert (tmp_path / "docs" / "benchmarks" / "headline.png").exists()


def test_the_headline_keeps_machines_and_shapes_apart(tmp_path):
    """Ratios are those of one machine and shape, whatever the others show."""
    here, gpu = tmp_path / "here", tmp_path / "gpu"
    longer = [step("HF sdpa", 8.0, shape="99 tokens"), step("lemur_fast", 4.0, shape="99 tokens")]
    written(here, [step("HF sdpa", 3.0), step("lemur_fast", 1.0), *longer])
    elsewhere(written(gpu, [step("HF sdpa", 0.5), step("lemur_fast", 0.1)]), "H100")
    lines = report.read([here, gpu])
    text = report.headline(lines, "picture")
    heading, _, sdpa, ours, *_ = text.splitlines()
    assert heading.count("tokens/s") == 3
    assert "CPU 1: tokens/s" in heading
    assert "CPU 2: tokens/s" in heading
    assert "| GPU: tokens/s" in heading
    assert sdpa == "| HF sdpa | 3 once | 1.00 |  | 1 once | 1.00 |  | 18 once | 1.00 |  |  |"
    assert ours == "| **lemur_fast** | 9 once | 3.00 |  | 2 once | 2.00 |  | 90 once | 5.00 |  |  |"
    legend = [line for line in text.splitlines() if line.startswith(("CPU ", "GPU "))]
    for line, told in zip(legend, (("9 tokens",), ("99 tokens",), ("H100", "9 tokens")), strict=True):
        assert all(part in line for part in told)
    assert report.plot_headline(tmp_path / "headline.png", lines)


def test_a_headline_without_a_cpu_says_so(tmp_path):
    elsewhere(written(tmp_path, [step("HF sdpa", 0.5), step("lemur_fast", 0.1)]), "H100")
    text = report.headline(report.read([tmp_path]), "picture")
    assert "| **lemur_fast** |  |  |  | 90 once | 5.00 |  |  |" in text
    assert "CPU: not measured" in text
    assert "not measured yet" not in text


def test_two_results_that_hold_the_same_are_both_named(tmp_path):
    one, two = (written(tmp_path / name, [step("lemur_fast", 1.0)]) for name in ("one", "two"))
    with pytest.raises(SystemExit) as refusal:
        report.read([tmp_path / "one", tmp_path / "two"])
    assert str(one) in str(refusal.value)
    assert str(two) in str(refusal.value)
    assert "LLaMA, 9 tokens, lemur_fast" in str(refusal.value)
    elsewhere(two, "another, 2 threads", "cpu")
    assert len(report.read([tmp_path / "one", tmp_path / "two", tmp_path / "two"])) == 2


@pytest.mark.parametrize("what", ["commit", "machine", "time", "versions"])
def test_no_ratio_between_runs(tmp_path, what):
    """Of two commits, thread counts, versions or times in one folder: each has a table, and tells its own."""
    ours, eager = written(tmp_path, [*rows()[:1], rows()[1]]).read_text().splitlines()
    line = json.loads(eager)
    other = line | {"machine": line["machine"].rpartition(",")[0] + ", 77 threads"}
    other = other if what == "machine" else line | {what: {"torch": "0"} if what == "versions" else "2999-01-01"}
    (tmp_path / "ops.jsonl").write_text(f"{ours}\n{json.dumps(other)}\n")
    text = report.report(report.read([tmp_path]), tmp_path / "benchmarks.md")
    assert "4.00" not in text
    assert text.count("| time |") == 2
    told = [part for part in text.splitlines() if "Python" in part and "torch" in part]
    assert len(told) == 2
    assert told[0] != told[1]


def test_a_bound_is_no_rival(tmp_path):
    """It is faster than all, and must not pass for the best peer, or ours for slow."""
    some = [
        Row("chat", case, rival, seconds=[seconds])
        for case in ("a", "b", "c")
        for rival, seconds in (("HF padded", 4.0), ("lemur_fast", 2.0), ("matrix products alone", 1.0))
    ]
    text = report.report(report.read([written(tmp_path, some)]), tmp_path / "benchmarks.md")
    assert "| a |  |  |  | 4 s once, x2.00 | 2 s once | 1 s once, x0.50 | 2.00 |" in text


def test_machines_of_one_long_name_do_not_share_plots(tmp_path):
    for name in ("one", "two"):
        elsewhere(written(tmp_path / name, rows()), "x" * 50 + name)
    report.report(report.read([tmp_path / "one", tmp_path / "two"]), tmp_path / "benchmarks.md")
    assert len(list((tmp_path / "benchmarks").iterdir())) == 2


def test_what_is_no_row_is_refused_by_name(tmp_path):
    with pytest.raises(SystemExit, match="no JSON lines"):
        report.read([tmp_path])
    (tmp_path / "a.jsonl").write_text('{"benchmark": "x"}\n')
    with pytest.raises(SystemExit, match=r"a.jsonl, line 1: lacks case, rival"):
        report.read([tmp_path])
    timed = json.loads(written(tmp_path / "other", rows()[:1]).read_text()) | {"error": "wrong: all of it"}
    (tmp_path / "a.jsonl").write_text(json.dumps(timed))
    with pytest.raises(SystemExit, match="a time beside an error"):
        report.read([tmp_path / "a.jsonl"])
    (tmp_path / "a.jsonl").write_text("no\n")
    with pytest.raises(SystemExit, match="is no JSON"):
        report.read([tmp_path])


@pytest.mark.parametrize(
    ("seconds", "told"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (1e-8, "0.01 us")]
)
def test_durations(seconds, told):
    assert report.duration(seconds) == told
