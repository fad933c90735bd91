"""In which order backends are tried: the table that ships, and the tables that `python -m lemur_fast tune` measured.

An order hangs on the op, the device's type, and, in a tuned table, on four things more:

========= ============================================================================================
dtype     of the main input
direction ``forward``: no gradient is wanted; ``training``: the call will be differentiated
size      elements of the main input: ``small`` below 2^20 (launches cost more than memory traffic), ``large`` from
          2^24 on (traffic is all that counts), ``medium`` between
head_dim  attention alone: up to 64, up to 128, up to 256
========= ============================================================================================

A tuned table is one JSON file for a model of GPU or CPU, in ``$XDG_CACHE_HOME/lemur_fast`` (``~/.cache/lemur_fast`` by
default). It is read when an op first meets such a device. A file that is broken, or was measured with another version
of lemur_fast, torch or triton, is ignored with a warning; what a file does not hold is served in the shipped order.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lemur_fast import _devices, _triton
from lemur_fast.files import write_json

BACKENDS = ("cuda", "triton", "varlen", "flash_attn", "cpu", "reference")

# CUDA C++ leads where a launch is a real share of the time, Triton where there are matrix products. varlen and
# flash_attn were not run by those who ship this table, so that only a measurement or the user brings them forward.
_GPU = ("cuda", "triton", "reference")
_GPU_PRODUCTS = ("triton", "cuda", "reference")
_CPU = ("cpu", "reference")
SHIPPED: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "rms_norm": _GPU,
        "rotary": _GPU,
        "swiglu": _GPU,
        "attention": (*_GPU_PRODUCTS, "varlen", "flash_attn"),
        "cross_entropy": _GPU,
        "linear_cross_entropy": _GPU_PRODUCTS,
    },
    "cpu": {
        "rms_norm": _CPU,
        "rotary": _CPU,
        "swiglu": _CPU,
        "attention": _CPU,
        "cross_entropy": _CPU,
        "linear_cross_entropy": _CPU,
    },
}
"""By device type and op. Devices that are no CUDA or ROCm ones have the order of a CPU."""

OPS = tuple(SHIPPED["cpu"])
DIRECTIONS = ("forward", "training")
SIZES = ("small", "medium", "large")
MEDIUM, LARGE = 2**20, 2**24
"""The fewest elements of those sizes."""
HEAD_DIMS = (64, 128, 256)
"""The largest head dimension of each class."""
DTYPES = ("float32", "bfloat16", "float16")

FORMAT = 1
"""Of the files. Another number is another meaning."""

T = TypeVar("T")

Order = tuple[str, ...]
Orders = tuple[tuple[Order, ...], ...]
"""By class of head dimension, then by size; a level that makes no difference has one entry, so that nobody looks at
shapes for it (and torch.compile puts no guard on them). Plain tuples, which the compiler takes as constants."""

Tiles = tuple[tuple[int, int, int, int], ...]
"""The tiles of attention's forward, dkdv and dq, as `lemur_fast.kernels.attention.Tiles` without its names."""


class Key(NamedTuple):
    """What an entry of a tuned table is for; `head_dim` is None for all ops but attention."""

    op: str
    dtype: str
    direction: str
    size: str
    head_dim: int | None


@dataclass(frozen=True)
class Table:
    """A tuned table, or with nothing in it the shipped one.

    Attributes:
        orders: entry -> backends, the fastest first, of those that were measured.
        tiles: class of head dimension -> tiles of attention in Triton, for 16-bit inputs.
        origin: what `explain` says of it.
    """

    orders: dict[Key, Order] = field(default_factory=dict)
    tiles: dict[int, Tiles] = field(default_factory=dict)
    origin: str = "shipped with lemur_fast"


def shipped_order(op: str, device_type: str) -> Order:
    """The backends of `op` in the order that ships."""
    return SHIPPED["cuda" if device_type == "cuda" else "cpu"][op]


def completed(measured: Order, shipped: Order) -> Order:
    """A measured order with the backends that were not measured, each before what it precedes in the shipped order.

    A backend that came into reach after the measurement (say, because nvcc was installed) thus keeps its rank.
    """
    order = list(measured)
    for place in reversed(range(len(shipped))):
        if shipped[place] not in measured:
            later = [order.index(name) for name in shipped[place + 1 :]]
            order.insert(min(later, default=len(order)), shipped[place])
    return tuple(order)


def _only_differences(orders: tuple) -> tuple:
    return orders[:1] if len(set(orders)) == 1 else orders


def _orders(table: Table, op: str, device_type: str, dtype: str, direction: str) -> Orders:
    shipped = shipped_order(op, device_type)
    head_dims = HEAD_DIMS if op == "attention" else (None,)
    return _only_differences(
        tuple(
            _only_differences(
                tuple(
                    completed(table.orders.get(Key(op, dtype, direction, size, head_dim), shipped), shipped)
                    for size in SIZES
                )
            )
            for head_dim in head_dims
        )
    )


# What was looked up.
_tables: dict[torch.device, Table] = {}
_known_orders: dict[tuple[str, torch.device, torch.dtype, bool], Orders] = {}

edition: int = 0
"""Another number whenever another table may hold: for those who remember what came of one."""


def forget() -> None:
    """Lets tables be read, and orders be looked up, anew."""
    _tables.clear()
    _changed()


def _changed() -> None:
    global edition
    edition += 1
    _known_orders.clear()


def table_of(device: torch.device) -> Table:
    """The table that speaks for a device: what was tuned for its model if there is such a file, or the shipped one."""
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _read(device) or Table()
    return table


@torch.compiler.assume_constant_result  # reads a file: torch.compile asks once, and takes the answer for a constant
def orders_for(op: str, device: torch.device, dtype: torch.dtype, wants_grad: bool) -> Orders:
    """The orders of an op on a device, of which `pick` takes the one for a shape."""
    key = (op, device, dtype, wants_grad)
    orders = _known_orders.get(key)
    if orders is None:
        name = str(dtype).removeprefix("torch.")
        orders = _orders(table_of(device), op, device.type, name, DIRECTIONS[wants_grad])
        _known_orders[key] = orders
    return orders


def of_head_dim(orders: Orders, traits: dict[str, Any]) -> tuple[Order, ...]:
    """The orders by size; looks at the head dimension only where it makes a difference."""
    if len(orders) == 1 or traits["head_dim"] <= HEAD_DIMS[0]:
        return orders[0]
    return orders[1] if traits["head_dim"] <= HEAD_DIMS[1] else orders[2]


def of_size(choices: tuple[T, ...], elements: int) -> T:
    """One of what there is by size; looks at the number only where it makes a difference."""
    if len(choices) == 1 or elements < MEDIUM:
        return choices[0]
    return choices[1] if elements < LARGE else choices[2]


def pick(orders: Orders, elements: int, traits: dict[str, Any]) -> Order:
    """The order for a shape."""
    return of_size(of_head_dim(orders, traits), elements)


def tiles_for(device: torch.device, head_dim: int) -> Tiles | None:
    """The tiles that were measured for attention on a device; None where the kernels' own table serves."""
    tiles = table_of(device).tiles
    return tiles.get(next(limit for limit in HEAD_DIMS if head_dim <= limit)) if tiles else None


@contextlib.contextmanager
def using(device: torch.device, table: Table) -> Iterator[None]:
    """Lets `table` speak for a device until the block ends, in all threads. What was compiled keeps its choices."""
    before = table_of(device)
    _tables[device] = table
    _changed()
    try:
        yield
    finally:
        _tables[device] = before
        _changed()


# ---- files -----------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where tuned tables are kept; its `~` stays one where there is no home directory (`path_of` refuses that)."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and the system does not know the user: a container's, say
        cache = Path("~/.cache")
    return cache / "lemur_fast"


def path_of(device: torch.device, model: str) -> Path:
    """The file of a model of device.

    Raises:
        OSError: there is no home directory for it, and no other place was named.
    """
    if folder().parts[0] == "~":
        raise OSError("there is no home directory; set XDG_CACHE_HOME to a folder")
    return folder() / f"{device.type}-{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}.json"


def versions() -> dict[str, str]:
    """What a measurement holds for."""
    from lemur_fast import __version__

    return {"lemur_fast": __version__, "torch": torch.__version__, "triton": _triton.installed() or "none"}


def _read(device: torch.device) -> Table | None:
    """The table tuned for the device's model; None, with a warning, if its file cannot be used."""
    model = _devices.model(device)
    if model is None:
        return None
    path = folder()  # what the warning names if there can be no file
    try:
        path = path_of(device, model)
        return _parse(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(
            f"lemur_fast: {path} is ignored: {error}; the shipped order of backends serves. "
            f"Tune again: python -m lemur_fast tune --device {device}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"it is broken ({what})")


def _parse(path: Path, text: str) -> Table:
    """The table in a file.

    Raises:
        ValueError: the file is broken, or from another version; says which.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter from brackets in brackets in brackets
        raise ValueError(f"it is broken ({error})") from None
    _check(isinstance(content, dict), "no object")
    _check(content.get("format") == FORMAT, f"format {content.get('format')!r}, not {FORMAT}")
    measured_with = content.get("versions")
    if measured_with != versions():
        raise ValueError(f"it was measured with {measured_with}, and this is {versions()}")
    for name in ("orders", "tiles"):
        _check(isinstance(content.get(name), list), f"{name} is no list")
    date = content.get("date")
    _check(isinstance(date, str), f"date {date!r}")
    return Table(
        dict(map(_parse_order, content["orders"])),
        dict(map(_parse_tiles, content["tiles"])),
        f"tuned {date} on {content.get('device')} ({path})",
    )


def _parse_order(entry: Any) -> tuple[Key, Order]:
    _check(isinstance(entry, dict), f"entry {entry!r}")
    key = Key(*(entry.get(name) for name in Key._fields))
    _check(key.op in OPS, f"op {key.op!r}")
    _check(key.dtype in DTYPES, f"dtype {key.dtype!r}")
    _check(key.direction in DIRECTIONS, f"direction {key.direction!r}")
    _check(key.size in SIZES, f"size {key.size!r}")
    _check(key.head_dim in (HEAD_DIMS if key.op == "attention" else (None,)), f"head_dim {key.head_dim!r}")
    order = entry.get("order")
    _check(isinstance(order, list) and len(order) > 0 and all(name in BACKENDS for name in order), f"order {order!r}")
    _check(len(set(order)) == len(order), f"order {order!r}")
    return key, tuple(order)


def _parse_tiles(entry: Any) -> tuple[int, Tiles]:
    _check(isinstance(entry, dict) and entry.get("head_dim") in HEAD_DIMS, f"tiles {entry!r}")
    tiles = entry.get("tiles")
    _check(isinstance(tiles, list) and len(tiles) == 3, f"tiles {entry!r}")
    for tile in tiles:
        _check(isinstance(tile, list) and len(tile) == 4 and all(type(n) is int for n in tile), f"tile {tile!r}")
        own, walked, warps, stages = tile
        powers = all(n > 0 and n & (n - 1) == 0 for n in (own, walked, warps))
        _check(powers and min(own, walked) >= 16 and max(own, walked) <= 512, f"tile {tile!r}")
        _check(warps <= 32 and 1 <= stages <= 8, f"tile {tile!r}")
    return entry["head_dim"], tuple(map(tuple, tiles))


def _rank(entry: tuple[Key, Order]) -> tuple:
    key = entry[0]
    return (*key[:3], SIZES.index(key.size), key.head_dim or 0)


@contextlib.contextmanager
def _turn_to_write(device: torch.device) -> Iterator[tuple[Path, str]]:
    """Yields the file of the device's model, in a folder that exists, and the model; other writers wait meanwhile.

    Raises:
        OSError: the folder cannot be made, or nothing be locked in it.
    """
    model = _devices.model(device)
    if model is None:
        raise ValueError(f"device: got {device}, which this machine does not have")
    try:
        import fcntl  # here, since all but writing works where there is none
    except ImportError:
        raise OSError("this system has no fcntl, by which writers take turns") from None
    path = path_of(device, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path, model


def check_writable(device: torch.device) -> None:
    """Finds out whether `save` could write, by all that it does before it writes and a file that vanishes.

    Raises:
        OSError: it could not.
    """
    with _turn_to_write(device) as (path, _), tempfile.TemporaryFile(dir=path.parent):
        pass  # the lock alone may be an old one, in a folder that takes no new files


def save(device: torch.device, orders: dict[Key, Order], tiles: dict[int, Tiles]) -> Path:
    """Puts measured entries into the file of the device's model, beside those that it holds already and can keep.

    Writers take turns, so that of two that run at the same time neither loses what it measured; readers see the file
    before or after a writing, never in between.

    Returns:
        The file's path.

    Raises:
        OSError: it cannot be written.
    """
    with _turn_to_write(device) as (path, model):
        try:
            before = _parse(path, path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # nothing there, or nothing that still holds
            before = Table()
        content = {
            "format": FORMAT,
            "device": model,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": versions(),
            "orders": [
                key._asdict() | {"order": order} for key, order in sorted((before.orders | orders).items(), key=_rank)
            ],
            "tiles": [{"head_dim": limit, "tiles": found} for limit, found in sorted((before.tiles | tiles).items())],
        }
        write_json(path, content)
    forget()
    return path
