"""``python -m lemur_fast`` prints what a bug report needs.

Versions, the CPU and its features, GPUs and their driver, how the compiled part was built, and `explain`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import lemur_fast
from lemur_fast import _compiled
from lemur_fast._devices import cpu_model

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


if __name__ == "__main__":
    print(report())
    print()
    lemur_fast.explain()
