"""Which implementation serves an op.

Every op has up to four implementations, named by backend:

========== =======================================================
cuda       CUDA C++ kernels in ``csrc/cuda``
triton     Triton kernels in ``kernels/``
cpu        C++ kernels in ``csrc/cpu``
reference  the formula in plain torch: always there, on any device, in any dtype
========== =======================================================

The public functions of `lemur_fast.ops` call `choose` once, in the forward, and pass the name on to the operator and to
its backward, which may run in another thread. On a CUDA device the default order is cuda, triton, reference; on every
other device cpu, reference. `use_backend` and the environment variable ``LEMUR_FAST_BACKEND`` replace that order, and
then an op that none of the named backends can serve raises: nothing falls back in silence.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
_GPU_ORDER = ("cuda", "triton", "reference")
_CPU_ORDER = ("cpu", "reference")


class BackendError(RuntimeError):
    """None of the backends that were asked for can serve an op."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        refuse: says why this call cannot be served, or returns None when it can. Called with the device type, the
            dtype of the main input and the op's own traits (such as ``head_dim=``); must not look at tensor values.
        functions: the callables the op's operators run, by role (``forward``, ``backward``, ...).
    """

    refuse: Callable[..., str | None]
    functions: dict[str, Callable]


_registry: dict[str, dict[str, Backend]] = {}


def register_backend(op: str, name: str, *, refuse: Callable[..., str | None], **functions: Callable) -> None:
    """Adds the implementation `name` of `op` to the table that `choose` and `explain` read."""
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}; must be one of {', '.join(BACKENDS)}")
    _registry.setdefault(op, {})[name] = Backend(refuse, functions)


def implementation(op: str, backend: str, role: str) -> Callable:
    """The function that serves `role` of `op` in `backend`."""
    return _registry[op][backend].functions[role]


def serves_any(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """The `refuse` of an implementation that serves every call."""
    return None


def _check_names(names: tuple[str, ...], origin: str) -> tuple[str, ...]:
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(f"{origin}: got {', '.join(map(repr, unknown)) or 'no name'}; takes {', '.join(BACKENDS)}")
    return names


def _order_from_environment() -> tuple[str, ...] | None:
    value = os.environ.get("LEMUR_FAST_BACKEND", "")
    if not value:
        return None
    return _check_names(tuple(name.strip() for name in value.split(",")), "LEMUR_FAST_BACKEND")


# Read once, at import: a lookup in os.environ at every call would cost more than the choice itself.
_requested: tuple[str, ...] | None = _order_from_environment()
_debug: bool = os.environ.get("LEMUR_FAST_DEBUG", "0") not in ("", "0")


def debug_enabled() -> bool:
    """Whether ``LEMUR_FAST_DEBUG=1`` was set at import: checks that cost a device sync are then made."""
    return _debug


@contextlib.contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Serves every op by the first of the named backends that can, and raises where none can.

    Holds for the whole process (all threads) until the block ends. Blocks nest; the innermost one rules.

    Args:
        *names: backends in order of preference, of ``cuda``, ``triton``, ``cpu``, ``reference``.

    Raises:
        ValueError: an unknown name, or none.
        BackendError: on a call inside the block that none of the named backends can serve.

    Example:
        >>> with lemur_fast.use_backend("reference"):
        ...     y = lemur_fast.ops.rms_norm(x, weight)
    """
    global _requested
    _check_names(names, "use_backend")
    before, _requested = _requested, names
    try:
        yield
    finally:
        _requested = before


def _reason(op: str, name: str, device_type: str, dtype: torch.dtype, traits: dict[str, object]) -> str | None:
    """Why backend `name` cannot serve this call of `op`; None when it can."""
    backend = _registry[op].get(name)
    if backend is None:
        return "not written for this op"
    return backend.refuse(device_type, dtype, **traits)


def choose(op: str, device: torch.device, dtype: torch.dtype, **traits: object) -> str:
    """The backend that serves this call.

    Args:
        op: the op's name, as in `lemur_fast.ops`.
        device: the device of the inputs.
        dtype: the dtype of the main input.
        **traits: what else the choice may hang on, such as ``head_dim``.

    Raises:
        BackendError: none of the backends asked for can serve it; names each with its reason.
    """
    default = _GPU_ORDER if device.type == "cuda" else _CPU_ORDER
    order = default if _requested is None else _requested
    for name in order:
        if _reason(op, name, device.type, dtype, traits) is None:
            return name
    reasons = "; ".join(f"{name}: {_reason(op, name, device.type, dtype, traits)}" for name in order)
    raise BackendError(f"{op} on {device.type} in {dtype}: no backend of those asked for can serve it ({reasons})")


# What `explain` asks for where a choice hangs on more than device and dtype: LLaMA-2's own values.
_TYPICAL_TRAITS: dict[str, dict[str, object]] = {"attention": {"head_dim": 128}}


def explanation(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """The text that `explain` prints."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    order = _requested or (_GPU_ORDER if device.type == "cuda" else _CPU_ORDER)
    origin = "default order" if _requested is None else "order asked for"
    lines = [f"lemur_fast ops on {device.type} in {dtype} ({origin}: {', '.join(order)})"]
    width = max(map(len, _registry))
    for op in _registry:
        traits = _TYPICAL_TRAITS.get(op, {})
        reasons = {name: _reason(op, name, device.type, dtype, traits) for name in BACKENDS}
        chosen = next((name for name in order if reasons[name] is None), "none: a call raises")
        others = [
            f"{name}: {reasons[name] or ('available' if name in order else 'available when asked for by name')}"
            for name in BACKENDS
            if name != chosen
        ]
        lines.append(f"  {op:<{width}}  -> {chosen:<9}  [{'; '.join(others)}]")
    return "\n".join(lines)


def explain(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
    """Prints for each op which backend a call would get, and why the others would not serve it.

    Args:
        device: device to ask for; the GPU when there is one, else the CPU.
        dtype: dtype of the main input to ask for.
    """
    print(explanation(device, dtype))
