"""Two commits side by side: what is noise, and that different results have no ratio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare


class Answers:
    """Stands in for a commit's process."""

    def __init__(self, results, seconds):
        self.names = list(results)
        self.results, self.seconds, self.asked = results, seconds, set()

    def ask(self, name):
        if name not in self.asked:
            self.asked.add(name)
            return self.results[name]
        return self.seconds[name]


def test_ratios_and_different_results():
    right = [[1.0, 2.0], [3.0]]
    base = Answers({"op": right, "wrong": right, "gone": right}, {"op": 2.0})
    ours = Answers({"new": right, "op": right, "wrong": [[1.0, 2.0], [3.3]]}, {"op": 1.0})
    lines = compare.measure(base, ours, rounds=4)
    assert lines == [
        {"name": "op", "base": 2.0, "ours": 1.0, "ratio": 2.0, "noise": 0.0},
        {"name": "wrong", "error": "the results differ"},
    ]
    text = compare.table([*lines, {"name": "near", "base": 1.0, "ours": 1.05, "ratio": 0.95, "noise": 0.1}])
    assert [line.endswith("noise") for line in text.splitlines()] == [True, False, False, True]


def test_nan_differs():
    assert compare.differs([[float("nan")]], [[1.0]])
    assert compare.differs([[1.0]], [[float("nan")]])
    assert not compare.differs([[0.0]], [[0.0]])


def test_a_wrong_base_is_named():
    program = Path(compare.__file__)
    done = subprocess.run([sys.executable, program, "no-such-commit"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-commit" in done.stderr
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert "base: a commit is needed" in done.stderr


@pytest.mark.parametrize("fails", ["b", "o"])
def test_where_one_does_not_start_no_process_is_left(monkeypatch, tmp_path, fails):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncase $PWD in */{fails}) exit 3;; esac\necho '[]'\nexec sleep 60\n")
    python.chmod(0o755)
    started, start = [], subprocess.Popen

    def watched(*given, **named):
        started.append(start(*given, **named))
        return started[-1]

    monkeypatch.setattr(compare.sys, "executable", str(python))
    monkeypatch.setattr(compare.subprocess, "Popen", watched)
    with pytest.raises(SystemExit, match="ended with 3"), compare.running(tmp_path, tmp_path, "cpu"):
        pass
    assert len(started) == (1 if fails == "b" else 2)
    assert all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_a_commit_against_itself():
    command = [sys.executable, compare.__file__, "HEAD", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "forward and backward of a small model" in done.stdout
