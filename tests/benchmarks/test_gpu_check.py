"""The check for a machine with a GPU: sections that fail, hang, end well and are not repeated."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Section


def says(text, then=""):
    return lambda device: ["-c", f"print({text!r}); {then}"]


SECTIONS = (
    Section("fine", "ends well", says("all is well"), 60),
    Section("fails", "raises", says("before", "raise SystemExit(3)"), 60),
    Section("hangs", "never ends", says("started", "import time, sys; sys.stdout.flush(); time.sleep(60)"), 1),
    Section("last", "comes after them", says("the last"), 60),
)


@pytest.fixture
def check(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "SECTIONS", SECTIONS)
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "the same")
    return lambda *more: gpu_check.main(gpu_check.arguments_of(["--device", "cpu", "--out", str(tmp_path), *more]))


def states(folder):
    sections = json.loads((folder / "report.json").read_text())["sections"]
    return {section["name"]: section["state"] for section in sections}


def test_no_section_loses_another(check, tmp_path):
    assert check() == 1
    assert states(tmp_path) == {
        "fine": "done",
        "fails": "failed (exit status 3)",
        "hangs": "timed out after 5 s",
        "last": "done",
    }
    text = (tmp_path / "gpu-report.md").read_text()
    assert text.startswith("# GPU check, tried on a CPU")
    for printed in ("all is well", "before", "started", "the last"):
        assert printed in text
    assert "2 of 4 sections ended well" in text


def test_only_what_did_not_end_well_is_run_again(check, tmp_path, monkeypatch, capsys):
    check("--only", "fine", "fails")
    assert states(tmp_path)["last"] == "not run"
    capsys.readouterr()
    assert check("--only", "fine", "fails") == 1
    printed = capsys.readouterr().out
    assert "fails: raises" in printed
    assert "fine: ends well" not in printed
    assert check("--only", "fine", "--again") == 0
    assert "fine: ends well" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "another commit")
    check("--only", "fine")
    assert "fine: ends well" in capsys.readouterr().out


def test_what_does_not_fit_the_time_is_left_for_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "SECTIONS", SECTIONS[:1])
    state, seconds, tail = gpu_check.run_section(SECTIONS[2], "cpu", tmp_path, 0.5)
    assert state.startswith("timed out")
    assert seconds < 30
    assert tail in ("", "started")


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(gpu_check.arguments_of([])) == 2
    assert "DEVICE=cpu" in capsys.readouterr().err


def test_the_sections_have_ten_minutes_together():
    assert sum(s.seconds for s in gpu_check.SECTIONS) <= 60 * gpu_check.MINUTES - 4 * gpu_check.MARGIN
    assert all(s.seconds > gpu_check.LEAST for s in gpu_check.SECTIONS)
    rows = [s.rows for s in gpu_check.SECTIONS if s.rows]
    assert len(set(rows)) == len(rows)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """The check with its own sections and a clock that only they advance: each by what `takes` says of its limit."""
    now, limits = [1000.0], {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "the same")
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    written = []
    monkeypatch.setattr(gpu_check, "write", lambda *given: written.append(given))

    def run(takes, *more):
        began = now[0]
        limits.clear()

        def run_section(section, device, out, limit):
            limits[section.name] = limit
            now[0] += takes(section, limit)
            return "done", takes(section, limit), ""

        monkeypatch.setattr(gpu_check, "run_section", run_section)
        gpu_check.main(gpu_check.arguments_of(["--out", str(tmp_path), *more]))
        assert now[0] - began <= 60 * gpu_check.MINUTES - gpu_check.MARGIN
        return limits

    return run


def test_where_all_hang_each_has_its_own_time_and_the_whole_its_ten_minutes(on_a_gpu):
    limits = on_a_gpu(lambda section, limit: limit)
    assert set(limits) == {section.name for section in gpu_check.SECTIONS}
    for section in gpu_check.SECTIONS:
        assert limits[section.name] >= section.seconds


def test_a_section_gets_what_those_before_it_left_over(on_a_gpu):
    limits = on_a_gpu(lambda section, limit: 1.0)
    first, last = gpu_check.SECTIONS[0], gpu_check.SECTIONS[-1]
    assert limits[last.name] > limits[first.name] + 400
    # A section that is gone on with alone has the whole run, however little it has beside others.
    assert on_a_gpu(lambda section, limit: limit, "--only", "train", "--again")["train"] == 590


def test_what_is_gone_on_with_keeps_its_beginning(check, tmp_path, monkeypatch):
    began = lambda: json.loads((tmp_path / "report.json").read_text())["began"]  # noqa: E731
    times = iter(f"2026-01-01T00:00:0{n}Z" for n in range(9))
    monkeypatch.setattr(gpu_check.time, "strftime", lambda *_: next(times))
    check("--only", "fine")
    first = began()
    check("--only", "last")
    check("--only", "last", "--again")
    assert began() == first
    assert f"begun {first}, written" in (tmp_path / "gpu-report.md").read_text()
    check("--again")
    second = began()
    assert second > first
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "another commit")
    check("--only", "fine")
    assert began() > second


def test_on_a_gpu_cuda_must_be_built(monkeypatch, tmp_path):
    """A build without it is a failure there, not a matter of which compilers are found."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for name in ("LEMUR_FAST_CUDA", "LEMUR_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    shown = "print([os.environ.get(f'LEMUR_FAST_{n}') for n in ('CUDA', 'CUDA_ARCHS', 'CHECK_SECONDS')])"
    section = Section("shows", "its environment", lambda _: ["-c", f"import os; {shown}"], 60)
    assert gpu_check.run_section(section, "cuda", tmp_path, 60.0)[2] == "['1', '90', '60']"
    assert gpu_check.run_section(section, "cpu", tmp_path, 60.0)[2] == "[None, None, '60']"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sections_ask_benchmarks_for_arguments_that_they_have(device):
    for section in gpu_check.SECTIONS:
        command = section.command(device)
        if "--run" in command:
            module, given = command[command.index("--run") + 1 :]
            program = __import__(f"benchmarks.{module}", fromlist=["Arguments"])
            program.Arguments(**json.loads(given), json=Path("rows"))
        else:
            assert section.rows == ""


def test_a_program_gets_its_arguments(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr("benchmarks.ops.main", found.append)
    gpu_check.run_program("ops", '{"only": ["swiglu"], "rounds": 2}', str(tmp_path / "rows.jsonl"))
    assert (found[0].only, found[0].rounds, found[0].json) == (("swiglu",), 2, tmp_path / "rows.jsonl")


def test_it_needs_no_more_than_an_installation_pytest_and_rich():
    """What its machine may lack is imported where it is used, if at all."""
    there = {"torch", "transformers", "triton", "numpy", "rich", "pytest", "tqdm", "safetensors", "lemur_fast"}
    root = Path(gpu_check.__file__).parent
    for name in ("gpu_check", "harness", "peers", "ops", "attention", "train_step", "scaling", "report"):
        for node in ast.parse((root / f"{name}.py").read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                first = module.partition(".")[0]
                assert first in there | {"benchmarks"} | sys.stdlib_module_names, f"{name} imports {module}"
