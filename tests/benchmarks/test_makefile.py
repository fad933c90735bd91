"""`make bench`: what it runs on a CPU and on a GPU, with a stand-in for Python that notes how it is called."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
import tyro

from benchmarks import ops

ROOT = Path(__file__).parents[2]
OF_CPU = {"products", "optimizer", "packing", "host_overhead", "chat", "dedup", "data", "pretrain"}
TAKE_DEVICE = {"train_step", "attention", "ops", "scaling"}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def bench(tmp_path):
    """Runs `make bench`; returns its process, the calls of Python as lists of words, and the limits of time."""
    (tmp_path / "bin").mkdir()
    for name, does in (
        ("python", f'echo "$@" >> {tmp_path}/calls; case $2 in *.ops) exit 3;; esac'),
        ("timeout", f'echo "$@" >> {tmp_path}/limits; shift 3; exec "$@"'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "installed").touch()

    def run(*given):
        rows = f"ROWS={tmp_path}/rows"
        command = ["make", "bench", f"BIN={tmp_path}/bin", f"INSTALLED={tmp_path}/installed", rows, *given]
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        calls, limits = ((tmp_path / name) for name in ("calls", "limits"))
        read = lambda path: [line.split() for line in path.read_text().splitlines()] if path.exists() else []  # noqa: E731
        return done, read(calls), read(limits)

    return run


def programs(calls):
    """Name -> what follows it on the command line, as its own `Arguments`."""
    assert [words[0] for words in calls] == ["-m"] * len(calls)
    found = {}
    for _, module, *rest in calls:
        program = importlib.import_module(module)
        name = module.removeprefix("benchmarks.")
        found[name] = tyro.cli(program.Arguments, args=rest) if rest else None
    return found


def test_on_a_cpu_everything_runs_and_has_a_spread(bench):
    done, calls, limits = bench()
    found = programs(calls)
    assert set(found) == TAKE_DEVICE | OF_CPU | {"report"}
    assert not limits
    for name in TAKE_DEVICE | OF_CPU:
        assert found[name].json.name == f"{name}.jsonl"
        assert getattr(found[name], "rounds", 3) >= 3
    for name in TAKE_DEVICE:
        assert found[name].device == "cpu"
    assert {"llama-2-7b", "llama-2-13b", "small"} <= set(found["ops"].shapes)
    assert done.returncode != 0
    assert "failed: ops\n" in done.stdout  # and those after it ran all the same
    assert "left out" not in done.stdout


def test_on_a_gpu_what_measures_the_cpu_is_left_out_aloud_and_the_rest_ends_in_time(bench):
    done, calls, limits = bench("DEVICE=cuda")
    found = programs(calls)
    assert set(found) == TAKE_DEVICE | {"report"}
    assert all(found[name].device == "cuda" for name in TAKE_DEVICE)
    assert set(found["ops"].shapes) == set(ops.MODELS)
    for name in OF_CPU:
        assert f"left out: benchmarks.{name}, which measures the CPU alone\n" in done.stdout
    assert len(limits) == len(TAKE_DEVICE)
    seconds = [int(words[1].removeprefix("--kill-after=")) + int(words[2]) for words in limits]
    assert sum(seconds) < 9.5 * 60  # the rest is the report's


def test_a_device_of_another_name_is_refused(bench):
    done, calls, _ = bench("DEVICE=gpu")
    assert done.returncode != 0
    assert "DEVICE: got gpu; takes cpu or cuda" in done.stderr
    assert not calls
