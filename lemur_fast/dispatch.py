"""Which implementation serves an op.

Every op has several implementations, named by backend:

========== =======================================================
cuda       CUDA C++ kernels in ``csrc/cuda``
triton     Triton kernels in ``kernels/``
varlen     attention alone: ``torch.nn.attention.varlen``
flash_attn attention alone: the flash-attn package, when installed
cpu        C++ kernels in ``csrc/cpu``
reference  the formula in plain torch: always there, on any device, in any dtype
========== =======================================================

The public functions of `lemur_fast.ops` call `choose` once, in the forward, and pass the name on to the operator and to
its backward, which may run in another thread. The order in which backends are tried comes from `preferences`: what
ships, or what ``python -m lemur_fast tune`` measured on this device. `use_backend` and the environment variable
``LEMUR_FAST_BACKEND`` replace that order, and then an op that none of the named backends can serve raises: nothing
falls back in silence.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemur_fast import preferences
from lemur_fast.preferences import BACKENDS, Order, of_head_dim, of_size, orders_for, pick


class BackendError(RuntimeError):
    """None of the backends that were asked for can serve an op."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        refuse: says why this call cannot be served, or returns None when it can. Called with the device of the inputs,
            the dtype of the main one, ``wants_grad=`` and the op's own traits (such as ``head_dim=``); must not look at
            tensor values.
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
    _by_size.cache_clear()


def implementation(op: str, backend: str, role: str) -> Callable:
    """The function that serves `role` of `op` in `backend`."""
    return _registry[op][backend].functions[role]


def serves_any(device: torch.device, dtype: torch.dtype, **traits: object) -> str | None:
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
        *names: backends in order of preference, of ``cuda``, ``triton``, ``varlen``, ``flash_attn``, ``cpu``,
            ``reference``.

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
    _by_size.cache_clear()  # a block starts from what backends refuse now, and leaves nothing behind
    try:
        yield
    finally:
        _requested = before
        _by_size.cache_clear()


def allows(name: str) -> bool:
    """Whether backend `name` may serve: by default, or because it was asked for."""
    return _requested is None or name in _requested


def wants_grad(*tensors: Tensor) -> bool:
    """Whether a call on these tensors will be differentiated, as far as can be known."""
    for tensor in tensors:
        if tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def _reason(op: str, name: str, device: torch.device, dtype: torch.dtype, traits: dict[str, object]) -> str | None:
    """Why backend `name` cannot serve this call of `op`; None when it can."""
    backend = _registry[op].get(name)
    if backend is None:
        return "not written for this op"
    return backend.refuse(device, dtype, **traits)


def choose(op: str, device: torch.device, dtype: torch.dtype, elements: int, wants_grad: bool, **traits: object) -> str:
    """The backend that serves this call.

    Args:
        op: the op's name, as in `lemur_fast.ops`.
        device: the device of the inputs.
        dtype: the dtype of the main input.
        elements: number of elements of the main input.
        wants_grad: whether the call will be differentiated.
        **traits: what else the choice may hang on, such as ``head_dim``.

    Raises:
        BackendError: none of the backends asked for can serve it; names each with its reason.
    """
    if not torch.compiler.is_compiling():
        try:
            deterministic = torch.are_deterministic_algorithms_enabled()
            names = _by_size(_requested, preferences.edition, deterministic, op, device, dtype, wants_grad, **traits)
            return names[0] if len(names) == 1 else of_size(names, elements)
        except TypeError:  # a symbolic shape, which is met outside of the compiler too, cannot be hashed
            pass
    order = _requested
    if order is None:
        order = pick(orders_for(op, device, dtype, wants_grad), elements, traits)
    return _first_of(order, op, device, dtype, wants_grad, traits)


def _first_of(
    order: Order, op: str, device: torch.device, dtype: torch.dtype, wants_grad: bool, traits: dict[str, object]
) -> str:
    """The first backend of an order that can serve a call."""
    traits["wants_grad"] = wants_grad
    backends = _registry[op]
    for name in order:
        backend = backends.get(name)
        if backend is not None and backend.refuse(device, dtype, **traits) is None:
            return name
    reasons = "; ".join(f"{name}: {_reason(op, name, device, dtype, traits)}" for name in order)
    raise BackendError(f"{op} on {device.type} in {dtype}: no backend of those asked for can serve it ({reasons})")


@functools.lru_cache(maxsize=1024)
def _by_size(
    requested: Order | None,
    edition: int,
    deterministic: bool,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    wants_grad: bool,
    **traits: Any,
) -> tuple[str, ...]:
    """What serves a kind of call, by size, with one entry where sizes make no difference; an error is not kept.

    `edition`, of the tables, and `deterministic`, the one setting of torch's that refusals look at, are here because
    the answer hangs on them: one that is remembered cannot outlive what it was made from.
    """
    if requested is not None:
        return (_first_of(requested, op, device, dtype, wants_grad, traits),)
    orders = of_head_dim(orders_for(op, device, dtype, wants_grad), traits)
    return tuple(_first_of(order, op, device, dtype, wants_grad, traits) for order in orders)


# What `explain` asks for where a choice hangs on more than device, dtype and size: training at LLaMA-2's own values.
_TYPICAL_TRAITS: dict[str, dict[str, object]] = {"attention": {"head_dim": 128}}


def _line(op: str, order: tuple[str, ...], device: torch.device, dtype: torch.dtype, wants_grad: bool) -> str:
    """What an order comes to: the backend chosen, and of the others why they are not."""
    traits = {"wants_grad": wants_grad, **_TYPICAL_TRAITS.get(op, {})}
    written = [name for name in BACKENDS if name in _registry[op]]
    reasons = {name: _reason(op, name, device, dtype, traits) for name in BACKENDS}
    chosen = next((name for name in order if reasons[name] is None), "none: a call raises")
    others = [
        f"{name}: {reasons[name] or ('available' if name in order else 'available when asked for by name')}"
        for name in written
        if name != chosen
    ]
    absent = [name for name in BACKENDS if name not in written]
    if absent:
        others.append(f"not written for this op: {', '.join(absent)}")
    return f"-> {chosen:<9}  [{'; '.join(others)}]"


def _classes(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(name, order, whether gradients are wanted) of each class of calls that has an order of its own."""
    by_direction = [orders_for(op, device, dtype, wanted) for wanted in (False, True)]
    for wanted, orders in enumerate(by_direction):
        direction = "" if by_direction[0] == by_direction[1] else preferences.DIRECTIONS[wanted]
        if not direction and not wanted:
            continue  # told once, as training
        for sizes, head_dim in zip(orders, preferences.HEAD_DIMS, strict=False):
            for order, size in zip(sizes, preferences.SIZES, strict=False):
                names = [
                    direction,
                    size if len(sizes) > 1 else "",
                    f"head_dim <= {head_dim}" if len(orders) > 1 else "",
                ]
                yield ", ".join(filter(None, names)), order, bool(wanted)


def explanation(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """The text that `explain` prints."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if _requested is None:
        origin = f"order of backends: {preferences.table_of(device).origin}"
    else:
        origin = f"order asked for: {', '.join(_requested)}"
    lines = [f"lemur_fast ops on {device} in {dtype} ({origin})"]
    width = max(map(len, _registry))
    for op in _registry:
        classes = list(_classes(op, device, dtype)) if _requested is None else [("", _requested, True)]
        if len(classes) == 1:
            lines.append(f"  {op:<{width}}  {_line(op, classes[0][1], device, dtype, True)}")
            continue
        lines.append(f"  {op:<{width}}  by class of calls:")
        longest = max(len(name) for name, _, _ in classes)
        for name, order, wanted in classes:
            lines.append(f"    {name:<{longest}}  {_line(op, order, device, dtype, wanted)}")
    return "\n".join(lines)


def explain(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
    """Prints for each op which backend a call would get, why the others would not serve it, and which table says so.

    Args:
        device: device to ask for; the GPU when there is one, else the CPU.
        dtype: dtype of the main input to ask for.
    """
    print(explanation(device, dtype))
