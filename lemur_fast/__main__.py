"""What can be asked of the installed package.

python -m lemur_fast          # what a bug report needs: versions, CPU, GPUs, how it was built, who serves each op
python -m lemur_fast tune     # measures which backend is the fastest on this machine, and remembers it
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import lemur_fast
from lemur_fast import _compiled, preferences, tuning
from lemur_fast._devices import cpu_model
from lemur_fast.ops._products import float32_is_faster

PACKAGES = ("torch", "triton", "transformers", "numpy", "accelerate", "peft", "trl")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _attempt(function: Callable[[], str]) -> str:
    """What the call returns, or what it raises: a report must not fail for what it reports."""
    try:
        return function()
    except (RuntimeError, ValueError) as error:
        return str(error)


def _compiled_lines() -> Iterator[tuple[str, str]]:
    """How the compiled part was built and what it finds; or why it is missing."""
    if _compiled.missing is not None:
        yield "compiled part", _compiled.missing
        return
    module = _compiled.C
    info = module.build_info()
    yield "compiled part", f"{info['version']}, {info['build_type']}, by {info['compiler']}"
    if info["version"] != lemur_fast.__version__:
        yield "", f"OUT OF DATE: built from {info['version']}; install again"
    yield (
        "OpenMP",
        "none: one thread" if info["openmp"] is None else f"{info['openmp']}, {module.cpu.threads()} threads",
    )
    yield "CPU features", " ".join(module.cpu.features()) or "none known"
    yield "CPU kernels", f"{_attempt(module.cpu.isa)} (built: {', '.join(info['cpu_isas'])})"
    yield "CPU products", f"bfloat16 in {'float32, which is faster here' if float32_is_faster() else 'bfloat16'}"
    if info["cuda"] is None:
        yield "CUDA kernels", f"not built: {info['cuda_missing']}"
        return
    yield "CUDA kernels", f"CUDA {info['cuda']} for {', '.join(info['cuda_archs'])}"
    driver = module.cuda.driver_version()
    if driver == 0:
        yield "CUDA driver", "none"
        return
    yield "CUDA driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}"
    yield "CUDA self test", _attempt(lambda: f"passed, ran code for sm_{module.cuda.self_test(0)}")


def _gpu_lines() -> Iterator[tuple[str, str]]:
    """The GPUs as torch sees them."""
    built_for = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "no GPU")
    yield "torch built for", f"CUDA {built_for}" if torch.version.cuda else built_for
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} SMs",
        )


def report() -> str:
    """The text that ``python -m lemur_fast`` prints."""
    lines = [
        ("lemur_fast", f"{lemur_fast.__version__} in {Path(lemur_fast.__file__).parent}"),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        *((package, _version(package)) for package in PACKAGES),
        ("system", platform.platform()),
        ("CPU", f"{cpu_model()} ({platform.machine()})"),
        ("torch threads", str(torch.get_num_threads())),
        *_compiled_lines(),
        *_gpu_lines(),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _device(text: str) -> torch.device:
    """The device that ``--device`` names."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"--device: got {text!r}; takes cpu, cuda, or cuda and a number, as in cuda:1")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"--device: got {text!r}; torch finds {count} GPUs here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names in a list with commas; each once, in the order of `known`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: got {name!r}; takes {', '.join(known)}")
    return [name for name in known if name in names]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"--seconds: got {text!r}; takes a positive number")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lemur_fast",
        description="Without a command: prints what a bug report needs (versions, CPU, GPUs, how the compiled part was "
        "built) and which backend serves each op, and why.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    command = commands.add_parser(
        "tune",
        help="measure which backend is the fastest on this machine, and remember it",
        description="Times every backend of every op on your device, forward alone and with its backward, at LLaMA-2's "
        "widths in small, medium and large calls, and on a GPU the tiles of attention. The winners are kept for this "
        f"model of device in {preferences.folder()} and serve from the next start on; plain torch is always among "
        "those timed. Takes a few minutes: leave the device alone meanwhile.",
    )
    command.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:1 (default: %(default)s)",
    )
    command.add_argument(
        "--ops",
        default=",".join(preferences.OPS),
        metavar="OP,OP",
        help="ops to measure; the others keep what they have (default: %(default)s)",
    )
    command.add_argument(
        "--dtypes",
        default="bfloat16",
        metavar="DTYPE,DTYPE",
        help=f"dtypes of the inputs, of {', '.join(preferences.DTYPES)} (default: %(default)s)",
    )
    command.add_argument(
        "--seconds",
        default="0.5",
        help="budget for timing one backend in one call; more is steadier (default: %(default)s)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the arguments give."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        print(report())
        print()
        lemur_fast.explain()
        return
    try:
        device = _device(given.device)
        chosen_ops = _names("--ops", given.ops, preferences.OPS)
        dtypes = _names("--dtypes", given.dtypes, preferences.DTYPES)
        seconds = _seconds(given.seconds)
    except ValueError as error:
        parser.exit(2, f"python -m lemur_fast tune: {error}\n")
    print(tuning.tune(device, chosen_ops, dtypes, seconds))


if __name__ == "__main__":
    main()
