"""The one place that imports the compiled part, `lemur_fast._C`, and knows why it is missing."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lemur_fast import _devices

_FOLDER = Path(__file__).resolve().parent


def _import() -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none."""
    try:
        return importlib.import_module("lemur_fast._C"), None
    except ImportError as error:
        files = sorted(path.name for path in _FOLDER.glob("_C.*") if path.suffix in (".so", ".pyd"))
        if not files:
            return None, "it was not built"
        if not any(f"-{sys.version_info.major}{sys.version_info.minor}-" in name for name in files):
            return None, f"it was built for another Python ({', '.join(files)})"
        return None, f"it does not load ({error})"


def _remedy() -> str:
    if (_FOLDER.parent / "setup.py").exists():
        return f"run `pip install -e .` in {_FOLDER.parent} (a C++ compiler is needed)"
    return "install a C++ compiler (g++ or clang++), then `pip install --force-reinstall --no-deps` lemur_fast"


C: Any
"""The compiled module; None when it is missing. Its kernels are called by position, in the order of `_C.pyi`, at least
in a forward: to look up a name takes it 0.1 us, and 17 of them longer than many a kernel."""
C, _reason = _import()

missing: str | None = None
"""Why the compiled part is missing and what to do about it; None when it is there."""
if _reason is not None:
    missing = f"the compiled part is missing: {_reason}; {_remedy()}"


def warn_if_missing() -> None:
    """Warns, once a process, that the compiled part is missing, and what that means."""
    if missing is not None:
        warnings.warn(
            f"lemur_fast: {missing}. Until then ops run on plain torch and packing in Python: right, but slower.",
            RuntimeWarning,
            stacklevel=3,  # the line that imports lemur_fast
        )


# The values of `_C.DType`, here too so that asking whether a dtype is served needs no compiled part.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dtype_code(dtype: torch.dtype) -> int:
    """The code by which `_C` knows a dtype."""
    return _CODES[dtype]


def place(tensor: torch.Tensor) -> tuple[Any, dict[str, int]]:
    """The kernels for the device that a tensor lies on: a submodule of `_C`, and the arguments that only it takes."""
    if not tensor.is_cuda:
        return C.cpu, {}
    device = tensor.get_device()
    # The function that torch.cuda.current_stream wraps; the wrapper takes longer than the launch.
    return C.cuda, {"device": device, "stream": torch._C._cuda_getCurrentRawStream(device)}


@functools.cache
def processors(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def lacking(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Why none of the code that was built runs on a GPU; None when some does.

    ``sm_80`` runs on every 8.x, ``sm_86`` from 8.6 on, ``sm_90a`` on 9.0 alone; the driver compiles ``compute_120``,
    but not ``compute_100f``, for what came later.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        built = int(digits[:-1]), int(digits[-1])
        if number.endswith("a"):
            fits = built == capability
        elif kind == "sm" or number.endswith("f"):  # f: of its own family alone
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return None
    return f"the CUDA kernels were built for {', '.join(architectures)}; this GPU is sm_{capability[0]}{capability[1]}"


@torch.compiler.assume_constant_result  # neither the build nor the device changes
def _why_no_cuda(device: torch.device) -> str | None:
    """Why there are no CUDA kernels for a GPU; None when there are."""
    if missing is not None:
        return missing
    return _of_build(device)


@functools.cache
def _of_build(device: torch.device) -> str | None:
    info = C.build_info()
    if info["cuda"] is None:
        return f"the CUDA kernels were not built: {info['cuda_missing']}"
    return lacking(_devices.capability(device), info["cuda_archs"])


def refuses_cuda(device: torch.device, dtype: torch.dtype, **traits: object) -> str | None:
    """Why the CUDA C++ kernels cannot serve a call; None when they can."""
    if device.type != "cuda" or torch.version.hip:
        return "needs CUDA tensors"
    return _why_no_cuda(device) or _refuses_dtypes(dtype, traits)


def refuses_cpu(device: torch.device, dtype: torch.dtype, **traits: object) -> str | None:
    """Why the C++ kernels cannot serve a call; None when they can."""
    if device.type != "cpu":
        return "needs CPU tensors"
    if missing is not None:
        return missing
    return _refuses_dtypes(dtype, traits)


def _refuses_dtypes(dtype: torch.dtype, traits: dict[str, object]) -> str | None:
    for value in (dtype, *traits.values()):
        if type(value) is torch.dtype and value not in _CODES:
            return f"takes float32, bfloat16 and float16, not {value}"
    return None
