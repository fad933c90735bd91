"""What the benchmarks share: rivals timed in turns, the machine's description, and the rows that they write.

Every figure is a `Row`: one rival in one case. `write_rows` makes a JSON line of each, with what it was measured on and
what follows from the rows beside it (share of the copy bandwidth, ratio to each rival), and `benchmarks.report` reads
them. A program of one's own takes three steps:

    rows = [Row("my_benchmark", "a case", name, seconds=times) for name, times in found.items()]
    write_rows(path, rows)                      # where --json is given
    python -m benchmarks.report my.jsonl        # a table, in docs/benchmarks.md
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from lemur_fast import _devices, _malloc
from lemur_fast.files import write_text
from lemur_fast.training.distributed import compute_dtype

CPU = torch.device("cpu")
PACKAGES = (
    *("torch", "triton", "transformers", "lemur_fast", "trl", "liger-kernel", "flash-attn", "flash-attn-3", "xformers"),
    "cut-cross-entropy",
)
"""Whose versions every row names, as far as they are installed."""

T = TypeVar("T")


def command_line(arguments: type[T], description: str | None) -> T:
    """Reads the arguments of a benchmark from the command line; ``--help`` shows its docstring.

    tyro is imported here alone: `benchmarks.gpu_check` uses the programs where it is not installed.
    """
    import tyro

    spec = sys.modules["__main__"].__spec__
    return tyro.cli(arguments, description=description, prog=f"python -m {spec.name}" if spec else None)


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(device: torch.device = CPU) -> str:
    """One line: device, threads, versions, commit. Every printed figure stands under it, and is that device's."""
    known = environment(device)
    versions = ", ".join(f"{name} {known['versions'][name]}" for name in ("torch", "transformers"))
    return f"{known['machine']}, {versions}, Python {known['python']}, {known['commit']}"


def dtype_to_measure(asked: str, device: str) -> str:
    """The name of the dtype that is meant: for "auto" bfloat16, or float32 on a CPU that only emulates it."""
    if asked != "auto":
        return asked
    return "bfloat16" if device != "cpu" else str(compute_dtype(CPU)).removeprefix("torch.")


def machine_and_dtype(dtype: str, device: torch.device = CPU) -> str:
    """`machine`, and where float32 is the default, why."""
    if device.type != "cpu" or dtype != "float32" or compute_dtype(CPU) == torch.bfloat16:
        return machine(device)
    return (
        f"{machine(device)}\nfloat32 is the default here: as far as torch tells, this CPU emulates bfloat16, in which "
        "a step of stock Hugging Face may take minutes (--dtype bfloat16)"
    )


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """What figures hang on: the device's model, threads, versions, commit, time."""
    name = _devices.model(device) or str(device)
    return {
        "machine": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "device": device.type,
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of the packages that take part, and are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured, and whether the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "no commit known"
    return f"commit {name.strip()}" + (" with changes" if changed.strip() else "")


# ---- memory and time -------------------------------------------------------------------------------------------------


def on_gpu() -> bool:
    """Whether this process has work on a GPU: then its memory and its clock count."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def reset_peak_memory() -> None:
    """Makes `peak_memory` start anew (Linux or a GPU; elsewhere the peak is the process's whole life's)."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident memory of this process, or of its tensors on a GPU, in bytes, since `reset_peak_memory`."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_above(call: Callable[[], Any]) -> int:
    """Bytes that a call held at its peak beside what was there before it, its results included."""
    gc.collect()
    if on_gpu():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    else:
        give_back_freed_memory()
    reset_peak_memory()
    if not on_gpu():
        before = peak_memory()  # the peak of a moment: what is resident
    result = call()
    if on_gpu():
        torch.cuda.synchronize()
    peak = peak_memory() - before
    del result
    return peak


def give_back_freed_memory() -> None:
    """Makes malloc return what was freed to the system, where it can."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def page_faults() -> int:
    """Pages that this process has so far got fresh from the system."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_freed_memory() -> str:
    """Makes malloc keep what is freed for the next call, instead of giving it back to the system; says whether it does.

    For timing kernels whose outputs are large: what they would wait for is the system clearing pages.
    """
    if _malloc.keep_freed_memory():
        return "malloc keeps freed memory"
    return "malloc has settings, or is not glibc's: times may hold the system's clearing of fresh memory"


class Clock:
    """Time as the device knows it: events in its stream on a GPU, the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # Larger than any L2: what is timed finds its inputs in memory, as in a training step, and the host, which
        # launches while this is cleared, is ahead of the device.
        self._other = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda else None

    def settle(self) -> None:
        """Before what is timed."""
        if self._other is not None:
            self._other.zero_()

    def mark(self) -> Any:
        """A moment."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """From one moment to another; waits for the device."""
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass
class Timing:
    """What one run showed.

    Attributes:
        seconds: for each of its phases, of every round.
        faults: pages that it got fresh from the system, in all rounds.
    """

    seconds: list[list[float]] = field(default_factory=list)
    faults: int = 0


def phases_in_turns(
    runs: Mapping[str, Callable[[Callable[[], None]], None]],
    *,
    device: torch.device,
    rounds: int,
    budget: float = math.inf,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Times runs of this process round by round, so that a machine that slows down slows them all.

    Args:
        runs: name -> a function that is handed `mark`, and calls it at the end of each of its phases.
        device: where they work.
        rounds: timed rounds; fewer, but at least three, where all runs would take longer than `budget`.
        budget: seconds for all.
        warmup: rounds before, which are not counted.
    """
    clock = Clock(device)
    timings = {name: Timing() for name in runs}
    took = 0.0
    number = -warmup
    while number < rounds:
        began = time.perf_counter()
        for name, run in runs.items():
            clock.settle()
            before = page_faults()
            marks = [clock.mark()]
            run(lambda marks=marks: marks.append(clock.mark()))  # type: ignore[misc]
            phases = [clock.seconds(a, b) for a, b in itertools.pairwise(marks)]
            if number >= 0:
                timing = timings[name]
                timing.faults += page_faults() - before
                timing.seconds = timing.seconds or [[] for _ in phases]
                for seconds, phase in zip(timing.seconds, phases, strict=True):
                    seconds.append(phase)
        took = time.perf_counter() - began
        if number == -1:
            rounds = max(int(min(rounds, budget / max(took, 1e-9))), min(rounds, 3))
        number += 1
    return timings


def copy_run(nbytes: int, device: torch.device) -> Callable[[Callable[[], None]], None]:
    """For `phases_in_turns`: copies so many bytes in all, read and written, between two buffers."""
    source, target = (torch.zeros(max(nbytes // 2, 1), dtype=torch.int8, device=device) for _ in range(2))

    def run(mark: Callable[[], None]) -> None:
        target.copy_(source)
        mark()

    return run


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy of so many bytes in all: the best of ten."""
    timed = phases_in_turns({"copy": copy_run(nbytes, device)}, device=device, rounds=10)
    return nbytes / min(timed["copy"].seconds[0])


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product: the best of ten, on random data.

    On a CPU in float32 where a small product says that this is faster: what is computed in float32 would be above the
    peak of 16 bits, whose large product may take minutes.
    """

    def rate(multiplied: torch.dtype, size: int, rounds: int) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=multiplied) for _ in range(2))

        def run(mark: Callable[[], None]) -> None:
            torch.mm(a, b)
            mark()

        return 2 * size**3 / min(phases_in_turns({"": run}, device=device, rounds=rounds)[""].seconds[0])

    if device.type != "cpu":
        return rate(dtype, 8192, 10)
    return rate(max({dtype, torch.float32}, key=lambda each: rate(each, 512, 3)), 2048, 10)


# ---- rivals in processes of their own --------------------------------------------------------------------------------


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
            if on_gpu():
                torch.cuda.synchronize()
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
        # A process that is killed leaves its semaphores behind, and Python would warn of them.
        for connection in connections:
            with contextlib.suppress(OSError):  # a rival that failed has gone
                connection.send(False)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
    return measurements


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return "the process died (out of memory?)"


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One rival in one case.

    Attributes:
        benchmark: the program, and the section of the report.
        case: what is done, such as an op's name; rows of one benchmark, case, shape, dtype and direction are rivals.
        rival: who does it.
        shape: sizes, as printed.
        direction: "forward", "backward", "both", or nothing where there is no such thing.
        dtype: of the tensors, or nothing.
        seconds: of the timed rounds. Empty where there is no time.
        error: why there is none: what is wrong with the result, or why the rival cannot run.
        bytes: that must be moved at least, read and written.
        flops: that must be computed.
        copy_seconds: of a copy that moves as many bytes, measured in the same turns.
        peak_flops: FLOP/s of a large matrix product on the same device and dtype.
        peak_bytes: memory at its peak.
        at: where on a curve, such as ``{"tokens": 4096}``.
        facts: anything else: numbers and text, told as they are.
    """

    benchmark: str
    case: str
    rival: str
    shape: str = ""
    direction: str = ""
    dtype: str = ""
    seconds: list[float] = field(default_factory=list)
    error: str = ""
    bytes: float | None = None
    flops: float | None = None
    copy_seconds: float | None = None
    peak_flops: float | None = None
    peak_bytes: int | None = None
    at: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Of the seconds; None where there is no time."""
        return statistics.median(self.seconds) if self.seconds and not self.error else None

    @property
    def spread(self) -> float | None:
        """Half the range of the seconds over their median; None for a single one."""
        if not self.median or len(self.seconds) < 2:
            return None
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    @property
    def share_of_copy(self) -> float | None:
        """Of the bandwidth of a copy: 1 where it took no longer than moving its bytes once."""
        return self.copy_seconds / self.median if self.copy_seconds and self.median else None

    @property
    def share_of_peak(self) -> float | None:
        """Of the rate of a large matrix product."""
        return self.flops / self.median / self.peak_flops if self.flops and self.peak_flops and self.median else None

    @property
    def group(self) -> tuple[str, ...]:
        """What rivals have in common."""
        return (self.benchmark, self.case, self.shape, self.dtype, self.direction, json.dumps(self.at, sort_keys=True))

    def line(self, rivals: Iterable[Row] = ()) -> dict[str, Any]:
        """All facts, as they go into JSON; `rivals` are the rows of the same group."""
        return {
            "benchmark": self.benchmark,
            "case": self.case,
            "shape": self.shape,
            "direction": self.direction,
            "dtype": self.dtype,
            "rival": self.rival,
            "median": self.median,
            "spread": self.spread,
            "rounds": len(self.seconds) if self.median else 0,
            "error": self.error,
            "bytes": self.bytes,
            "flops": self.flops,
            "share_of_copy": self.share_of_copy,
            "share_of_peak": self.share_of_peak,
            "copy_bytes_per_second": self.bytes / self.copy_seconds if self.bytes and self.copy_seconds else None,
            "peak_flops": self.peak_flops,
            "peak_bytes": None if self.error else self.peak_bytes,
            "times_as_fast_as": {
                other.rival: other.median / self.median
                for other in rivals
                if other is not self and other.median and self.median
            },
            "at": self.at,
            "facts": self.facts,
        }


def lines_of(rows: list[Row], device: torch.device = CPU) -> list[dict[str, Any]]:
    """Each row with its rivals' ratios, and with what it was measured on."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    known = environment(device)
    return [row.line(groups[row.group]) | known for row in rows]


def write_rows(path: Path, rows: list[Row], device: torch.device = CPU) -> None:
    """One JSON line for each row, for `benchmarks.report`; written beside and renamed, folders made."""
    write_lines(path, lines_of(rows, device))


def write_json(path: Path, header: dict[str, Any], measurements: list[Measurement]) -> None:
    """As `write_rows`, of what `in_turns` returned.

    Args:
        path: the file.
        header: ``benchmark``, and other fields of `Row` that all have in common; what is none is a fact.
        measurements: one row for each.
    """
    write_rows(path, rows_of_measurements(header, measurements))


def rows_of_measurements(header: dict[str, Any], measurements: list[Measurement]) -> list[Row]:
    """A row for each of what `in_turns` returned; see `write_json`."""
    fields = {"case": "", **{k: v for k, v in header.items() if k in Row.__dataclass_fields__}}
    facts = {k: v for k, v in header.items() if k not in fields}
    return [
        Row(
            **fields | {"rival": m.name, "seconds": m.seconds, "error": m.error, "peak_bytes": m.peak_bytes or None},
            facts=dict(facts),
        )
        for m in measurements
    ]


def write_lines(path: Path, facts: list[dict[str, Any]]) -> None:
    """One JSON line for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in facts))
