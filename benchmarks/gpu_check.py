"""One command for a machine with a GPU and no network: builds, tests, tunes, measures, and writes gpu-report.md.

    make gpu-check                            # ten minutes at most; PYTHON=... is the Python that has torch
    make gpu-check DEVICE=cpu                 # the same program on small shapes, to try it where there is no GPU
    python -m benchmarks.gpu_check --only tests train --again

Each section runs in a process of its own, with a time limit, and writes a log: what fails, hangs or runs out of memory
loses no other. On a GPU they have ten minutes together: each has seconds of its own, and what those before it left
over. The compiled part must be built there with CUDA, and is for that GPU alone, unless LEMUR_FAST_CUDA and
LEMUR_FAST_CUDA_ARCHS say otherwise. A section that ended well is not run again for the same commit, device and versions
(``--again`` does), so the command goes on where it was stopped, or where its time ended. The report and
`report.json` are written anew after every section, and the rows of the benchmarks lie beside them, for
`python -m benchmarks.report --results gpu-check`.

Only what every installation of lemur_fast has is needed, and pytest and rich; peers take part where they are installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


MINUTES = 10
"""Of a run on a GPU, from its beginning to its report."""
MARGIN = 10.0
"""Seconds of them that no section gets: for its processes to end, and for the report."""
LEAST = 15.0
"""Seconds; with less left, a section is not begun."""
ON_CPU = 5
"""How many times as long a section may take there."""


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: what ``--only`` takes.
        about: for the report.
        command: of a device, what to run; after ``python``.
        seconds: that it has on a GPU whatever those before it take; see `limit_of`.
        rows: the name of its file of rows, where it writes one.
        on_cpu: whether it means anything on a CPU.
    """

    name: str
    about: str
    command: Callable[[str], list[str]]
    seconds: int
    rows: str = ""
    on_cpu: bool = True


def _program(module: str, on_gpu: dict[str, Any], on_cpu: dict[str, Any]) -> Callable[[str], list[str]]:
    """A benchmark of this package, by its `Arguments`: its command line would need tyro."""

    def command(device: str) -> list[str]:
        given = json.dumps({"device": device} | (on_gpu if device == "cuda" else on_cpu))
        return ["-m", "benchmarks.gpu_check", "--run", module, given]

    return command


def _tests(device: str) -> list[str]:
    chosen = ["-m", "gpu"] if device == "cuda" else ["-m", "not gpu and not slow"]
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/gpu", *chosen]


def _tests_of(*which: str) -> Callable[[str], list[str]]:
    return lambda device: [*_tests(device), *which]


def _tune(device: str) -> list[str]:
    seconds = "0.05" if device == "cuda" else "0.001"
    ops = [] if device == "cuda" else ["--ops", "swiglu"]
    return ["-m", "lemur_fast", "tune", "--device", device, "--seconds", seconds, *ops]


LLAMA = {"heads": 32, "kv_heads": 32, "head_dim": 128}
SECTIONS = (
    Section("machine", "What is installed, built and chosen", lambda device: ["-m", "lemur_fast"], 20),
    Section(
        "build",
        "The compiled part, built in place without isolation",
        lambda _: ["setup.py", "build_ext", "--inplace"],
        80,
    ),
    Section(
        "tests",
        "Every op and backend against float64, past 2^31 elements; a step without waits, in a CUDA graph, twice alike",
        _tests_of("-k", "not sanitizer"),
        95,
    ),
    Section(
        "tune", "Which backend and which tiles are the fastest here; the sections below use what it finds", _tune, 65
    ),
    Section(
        "train",
        "A training step of LLaMA-2-7B's shape, with MFU",
        _program(
            "train_step",
            {"model": "llama-2-7b", "batch": "drawn", "rounds": 8, "only": ["HF", "lemur_fast"]},
            {"batch": "drawn", "tokens": 128, "width": 64, "layers": 1, "rounds": 2, "only": ["HF sdpa", "lemur_fast"]},
        ),
        85,
        "train_step",
    ),
    Section(
        "attention",
        "Attention over packed documents, LLaMA-2-7B's heads",
        _program(
            "attention",
            {"tokens": 16384, **LLAMA, "seconds": 2.0},
            {"tokens": 256, "heads": 2, "kv_heads": 1, "steps": 3, "only": ["document"]},
        ),
        40,
        "attention",
    ),
    Section(
        "ops",
        "The ops against everyone who has them",
        _program(
            "ops",
            {"shapes": ["llama-2-7b", "small"], "rounds": 15, "seconds": 1.0},
            {"shapes": ["small"], "only": ["swiglu"], "rounds": 3},
        ),
        55,
        "ops",
    ),
    Section(
        "scaling",
        "How time and memory grow",
        _program(
            "scaling",
            {"seconds": 0.5},
            {"smaller": 16, "points": 2, "rounds": 2, "seconds": 0.1, "only": ["swiglu", "packing"]},
        ),
        25,
        "scaling",
    ),
    Section(
        "larger-ops",
        "The ops at the shapes of LLaMA-2-13B and 70B",
        _program("ops", {"shapes": ["llama-2-13b", "llama-2-70b"], "rounds": 15, "seconds": 1.0}, {}),
        55,
        "larger_ops",
        on_cpu=False,
    ),
    Section("sanitizer", "The kernels under compute-sanitizer", _tests_of("-k", "sanitizer"), 40, on_cpu=False),
)


@dataclass
class Outcome:
    """What a section came to: `state` is done, failed, timed out, or not run."""

    name: str
    state: str = "not run"
    seconds: float = 0.0
    fingerprint: str = ""
    tail: str = ""


def fingerprint(device: str) -> str:
    """What a result hangs on: where this changes, sections are run again."""
    from benchmarks.harness import commit, versions

    try:
        changes = subprocess.run(["git", "-C", str(ROOT), "diff", "HEAD"], capture_output=True, check=False).stdout
    except OSError:  # no git
        changes = b""
    known = f"{device}, Python {platform.python_version()}, {commit()}, {hashlib.sha1(changes).hexdigest()[:8]}"
    known += f", {versions()}"
    if device == "cuda":
        import torch

        known += f", {torch.cuda.get_device_name()}"
    return known


def limit_of(section: Section, later: Iterable[Section], device: str, end: float) -> float:
    """Seconds that a section may take now.

    On a GPU all that is left of the run but what the later sections have as their own: so none of them loses its time
    to a section that hangs, a section gets what others have not used, and the run ends in time.

    Args:
        section: that is about to begin.
        later: those that come after it in this run.
        device: cuda or cpu.
        end: of the whole run, by `time.monotonic`.
    """
    if device == "cpu":
        return section.seconds * ON_CPU
    return end - time.monotonic() - sum(each.seconds for each in later)


def run_section(section: Section, device: str, out: Path, limit: float) -> tuple[str, float, str]:
    """(state, seconds, end of what it printed); all of it goes into its log. It may take `limit` seconds."""
    command = section.command(device)
    if section.rows:
        command = [*command, str(out / f"{section.rows}.jsonl")]
    log = out / f"{section.name}.log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # What is tuned stays in the folder of the check: the user's own tables are left alone.
    environment |= {"XDG_CACHE_HOME": str(out / "cache")}
    if device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment = {"LEMUR_FAST_CUDA": "1", "LEMUR_FAST_CUDA_ARCHS": f"{major}{minor}"} | environment
    environment |= {"LEMUR_FAST_CHECK_SECONDS": f"{limit:.0f}"}  # for what divides them on, such as a test
    environment |= {"COLUMNS": "160", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with log.open("w") as stream:
        # A process group of its own, so that what it started ends with it.
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            state = "done" if code == 0 else f"failed (exit status {code})"
        except subprocess.TimeoutExpired:
            state = f"timed out after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return state, time.perf_counter() - began, tail_of(log)


def tail_of(log: Path, lines: int = 60) -> str:
    """The end of a log; a progress bar as it was left."""
    text = log.read_text(errors="replace")
    return "\n".join([line.split("\r")[-1].rstrip() for line in text.splitlines()][-lines:])


def write(out: Path, device: str, outcomes: list[Outcome], began: str) -> None:
    """The report and its JSON."""
    import torch

    from benchmarks.harness import environment
    from lemur_fast.files import write_json, write_text

    known = environment(torch.device(device))
    write_json(out / "report.json", known | {"began": began, "sections": [asdict(outcome) for outcome in outcomes]})
    done = sum(outcome.state == "done" for outcome in outcomes)
    text = [
        "# GPU check" if device == "cuda" else "# GPU check, tried on a CPU: small shapes, no figure here counts",
        "",
        f"{known['machine']}; Python {known['python']}, "
        + ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        + f"; {known['commit']}; begun {began}, written {known['time']}.",
        "",
        f"{done} of {len(outcomes)} sections ended well, in {sum(outcome.seconds for outcome in outcomes):.0f} s.",
        "",
        "| section | | state | seconds |",
        "| --- | --- | --- | --- |",
    ]
    about = {section.name: section.about for section in SECTIONS}
    text += [f"| {o.name} | {about[o.name]} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        if outcome.state != "not run":
            text += ["", f"## {outcome.name}: {outcome.state}", "", "```", outcome.tail, "```"]
    write_text(out / "gpu-report.md", "\n".join(text) + "\n")


def load(out: Path) -> tuple[dict[str, Outcome], str]:
    """Outcomes of an earlier run, and when it began."""
    try:
        found = json.loads((out / "report.json").read_text())
        return {outcome["name"]: Outcome(**outcome) for outcome in found["sections"]}, found["began"]
    except (OSError, ValueError, KeyError):
        return {}, ""


def run_program(module: str, given: str, rows: str) -> None:
    """A section's process: calls the benchmark with these arguments."""
    program = importlib.import_module(f"benchmarks.{module}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(given).items()}
    program.main(program.Arguments(**values, json=Path(rows)))


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_check", description=about, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where; cpu tries the program itself")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="also run sections that ended well before")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the report (default: gpu-check)")
    parser.add_argument("--run", nargs=3, metavar=("MODULE", "ARGUMENTS", "ROWS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> int:
    """Runs the sections; 1 where one of those asked for did not end well."""
    end = time.monotonic() + 60 * MINUTES - MARGIN
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "--device: got cuda, but torch finds no CUDA device; DEVICE=cpu tries the program itself", file=sys.stderr
        )
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    known, began = load(out)
    current = fingerprint(arguments.device)
    sections = [section for section in SECTIONS if section.on_cpu or arguments.device == "cuda"]
    outcomes = [known.get(section.name, Outcome(section.name)) for section in sections]
    outcomes = [o if o.fingerprint == current else Outcome(o.name) for o in outcomes]
    begun = [o for o in outcomes if o.state != "not run" and not (arguments.again and o.name in arguments.only)]
    if not begun or not began:  # nothing is gone on with
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a section's processes end with this one
    todo = [
        (number, section)
        for number, section in enumerate(sections)
        if section.name in arguments.only and (outcomes[number].state != "done" or arguments.again)
    ]
    # First what was never begun: a section that always fails must not keep the later ones from their turn.
    todo.sort(key=lambda each: outcomes[each[0]].state != "not run")
    for place, (number, section) in enumerate(todo, 1):
        limit = limit_of(section, [later for _, later in todo[place:]], arguments.device, end)
        if limit < LEAST and arguments.device == "cuda":
            print(f"{section.name}: not begun, for the {MINUTES} minutes are over; the same command goes on with it")
            continue
        print(f"{section.name}: {section.about} ...", flush=True)
        state, seconds, tail = run_section(section, arguments.device, out, limit)
        outcomes[number] = Outcome(section.name, state, round(seconds, 1), current, tail)
        print(f"{section.name}: {state}, {seconds:.0f} s; {out / section.name}.log", flush=True)
        write(out, arguments.device, outcomes, began)
    write(out, arguments.device, outcomes, began)
    print(f"report: {out / 'gpu-report.md'}")
    return int(any(o.state != "done" for o in outcomes if o.name in arguments.only))


if __name__ == "__main__":
    parsed = arguments_of()
    sys.exit(run_program(*parsed.run) if parsed.run else main(parsed))
