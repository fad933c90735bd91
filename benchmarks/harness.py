"""What the benchmarks share: rivals measured in turns, each in a process of its own, and the machine's description."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """One line: CPU, threads, versions, commit. Every printed figure stands under it, and is the CPU's."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{_cpu_name()}, {torch.get_num_threads()} threads, {packages}, Python {platform.python_version()}, {commit()}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured, and whether the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "no commit known"
    return f"commit {name.strip()}" + (" with changes" if changed.strip() else "")


def reset_peak_memory() -> None:
    """Makes `peak_memory` start anew (Linux; elsewhere the peak is the process's whole life's)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident memory of this process in bytes, since `reset_peak_memory`."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def page_faults() -> int:
    """Pages that this process has so far got fresh from the system."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_freed_memory() -> str:
    """Makes malloc keep what is freed for the next call, instead of giving it back to the system; says whether it does.

    For timing kernels whose outputs are large: what they would wait for is the system clearing pages.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "no mallopt here: times may hold the system's clearing of fresh memory"
    kept = mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0)
    return (
        "malloc keeps freed memory" if kept else "mallopt failed: times may hold the system's clearing of fresh memory"
    )


@dataclass
class Measurement:
    """What a rival showed: seconds of each timed step, peak bytes over them, and what its steps returned."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    results: list[Any] = field(default_factory=list)
    error: str = ""

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range over the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


def _serve(connection: Connection, make_step: Callable, arguments: tuple, warmup: int) -> None:
    """A rival's process: builds its step, warms up, then runs one step for every request."""
    try:
        step = make_step(*arguments)
        for _ in range(warmup):
            step()
        connection.send(None)
        while connection.recv():
            reset_peak_memory()
            start = time.perf_counter()
            result = step()
            seconds = time.perf_counter() - start
            connection.send((seconds, peak_memory(), result))
    except BaseException:
        connection.send(traceback.format_exc())


def in_turns(
    rivals: dict[str, tuple[Callable, tuple]], *, rounds: int, warmup: int, report: Callable[[str], None]
) -> list[Measurement]:
    """Times the steps of all rivals round by round, so that a machine that slows down slows them all.

    Args:
        rivals: name -> (make_step, arguments): ``make_step(*arguments)`` runs in a fresh process and returns the
            function to time. Both must pickle.
        rounds: timed steps of each.
        warmup: steps of each before any is timed.
        report: told what goes on.

    Returns:
        One measurement for each rival, in order; one that failed has `error` and no seconds.
    """
    context = multiprocessing.get_context("spawn")
    measurements = [Measurement(name) for name in rivals]
    connections, processes = [], []
    try:
        for measurement, (make_step, arguments) in zip(measurements, rivals.values(), strict=True):
            report(f"warming up: {measurement.name}")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_step, arguments, warmup), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
            measurement.error = _receive(ours) or ""
        for number in range(rounds):
            report(f"round {number + 1} of {rounds}")
            for measurement, connection in zip(measurements, connections, strict=True):
                if measurement.error:
                    continue
                connection.send(True)
                answer = _receive(connection)
                if isinstance(answer, str):
                    measurement.error = answer
                    measurement.seconds.clear()
                    continue
                seconds, peak, result = answer
                measurement.seconds.append(seconds)
                measurement.peak_bytes = max(measurement.peak_bytes, peak)
                measurement.results.append(result)
    finally:
        for process in processes:
            process.kill()
    return measurements


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return "the process died (out of memory?)"


def write_json(path: Path, header: dict[str, Any], measurements: list[Measurement]) -> None:
    """One JSON line for each measurement, with the header's facts in each."""
    write_lines(path, [header | asdict(measurement) for measurement in measurements])


def write_lines(path: Path, facts: list[dict[str, Any]]) -> None:
    """One JSON line for each."""
    path.write_text("".join(json.dumps(line) + "\n" for line in facts))
