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
        "hangs": "timed out after 2 s",
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
