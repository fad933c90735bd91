"""The one place that imports the compiled part, `lemur_fast._C`, and knows why it is missing."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

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
"""The compiled module; None when it is missing."""
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


def refuses_cpu(device: torch.device, dtype: torch.dtype, **traits: object) -> str | None:
    """Why the C++ kernels cannot serve a call; None when they can."""
    if device.type != "cpu":
        return "needs CPU tensors"
    if missing is not None:
        return missing
    for value in (dtype, *traits.values()):
        if type(value) is torch.dtype and value not in _CODES:
            return f"takes float32, bfloat16 and float16, not {value}"
    return None
