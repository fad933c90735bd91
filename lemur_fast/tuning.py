"""``python -m lemur_fast tune``: measures the backends on the user's own device, and keeps the winners.

Every op is called through its public function, at LLaMA-2-7B's widths and with as many tokens as make a call small,
medium and large (`lemur_fast.preferences`), once without gradients and once with its backward. For each of those:

    1. Every backend runs once, untimed, since the first call may compile. One that cannot serve is left out; one that
       fails, or whose results are not those of `reference`, goes last in the order and is reported.
    2. They are timed in turns, round by round, so that a machine that slows down slows them all; a round is as many
       calls, one after the other, as the budget allows. On a GPU that is the longer of the time to launch and the time
       to run, as in a training step. One that takes `HOPELESS` times as long as the fastest is timed once.
    3. The order that ships stands, except that a backend passes another when it was faster by more than the noise.

So `reference`, which is plain torch, serves wherever it is the fastest. On a GPU the tiles of attention in Triton are
measured first, each against its neighbours, by the same rule.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lemur_fast import _devices, _triton, ops, preferences
from lemur_fast.dispatch import BackendError, use_backend
from lemur_fast.preferences import Key, Tiles

ROUNDS = 7
HOPELESS = 3.0
SLOW = {"cuda": 4.0, "cpu": 1.0}
"""A call that takes more budgets than this is timed twice in all. On a CPU the large ones take seconds."""
LEAST_GAIN = 0.02
"""Of the time: less is noise, however steady the rounds."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Relative error of a whole tensor against the reference's in the same dtype: what only a wrong result exceeds."""

# ---- what is called --------------------------------------------------------------------------------------------------

WIDTH, HEADS, INTERMEDIATE, VOCABULARY = 4096, 32, 11008, 32000  # LLaMA-2-7B
TOKENS = {"small": 64, "medium": 1024, "large": 4096}
ROWS_OF_LOGITS = {"small": 16, "medium": 256, "large": 1024}
MOST_ON_CPU = {"swiglu": 1536, "cross_entropy": 528}
"""Tokens, or rows, that just make a large call of these ops: on a CPU, time grows with the elements and with nothing
else. The other ops' large calls have 2^24 elements anyway."""
VOCABULARY_ON_CPU = 4000
"""Of medium and large calls of linear_cross_entropy, which are products: their time is as the vocabulary for every
backend, and with all of it they would take most of the whole command's."""


def _rows(op: str, size: str, on_cpu: bool) -> int:
    rows = (ROWS_OF_LOGITS if op == "cross_entropy" else TOKENS)[size]
    return min(rows, MOST_ON_CPU.get(op, rows)) if on_cpu else rows


@dataclass
class Call:
    """A call of an op: its inputs, float ones to be rounded to the dtype under test, and which want gradients."""

    function: Callable[..., Any]
    inputs: list[Tensor]
    wanted: Sequence[int]


def _rms_norm(size: str, head_dim: int | None, on_cpu: bool) -> Call:
    tokens = _rows("rms_norm", size, on_cpu)
    inputs = [torch.randn(tokens, WIDTH), torch.rand(WIDTH) + 0.5, torch.randn(tokens, WIDTH)]
    return Call(lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual), inputs, (0, 1, 2))


def _rotary(size: str, head_dim: int | None, on_cpu: bool) -> Call:
    tokens, dim = _rows("rotary", size, on_cpu), WIDTH // HEADS
    angles = torch.outer(torch.arange(tokens), 10000.0 ** -(torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    inputs = [torch.randn(tokens, HEADS, dim), torch.randn(tokens, HEADS, dim), angles.cos(), angles.sin()]
    return Call(ops.rotary, inputs, (0, 1))


def _swiglu(size: str, head_dim: int | None, on_cpu: bool) -> Call:
    tokens = _rows("swiglu", size, on_cpu)
    return Call(ops.swiglu, [torch.randn(tokens, INTERMEDIATE), torch.randn(tokens, INTERMEDIATE)], (0, 1))


def _attention(size: str, head_dim: int | None, on_cpu: bool) -> Call:
    tokens, dim = _rows("attention", size, on_cpu), head_dim or WIDTH // HEADS
    q, k, v = (torch.randn(tokens, WIDTH // dim, dim) for _ in range(3))
    # Three documents; on a CPU large calls have more of them, not longer ones, whose time is as their length squared.
    packed = min(tokens, TOKENS["medium"]) if on_cpu else tokens
    starts = [start + part for start in range(0, tokens, packed) for part in (0, packed // 8, packed // 2)]
    documents = torch.tensor([*(min(start, tokens) for start in starts), tokens], dtype=torch.int32)
    return Call(ops.attention, [q, k, v, documents], (0, 1, 2))


def _cross_entropy(size: str, head_dim: int | None, on_cpu: bool) -> Call:
    rows = _rows("cross_entropy", size, on_cpu)
    return Call(ops.cross_entropy, [torch.randn(rows, VOCABULARY), torch.randint(0, VOCABULARY, (rows,))], (0,))


def _linear_cross_entropy(size: str, head_dim: int | None, on_cpu: bool) -> Call:
    tokens = _rows("linear_cross_entropy", size, on_cpu)
    vocabulary = min(VOCABULARY, VOCABULARY_ON_CPU) if on_cpu and size != "small" else VOCABULARY
    weight, labels = torch.randn(vocabulary, WIDTH) / WIDTH**0.5, torch.randint(0, vocabulary, (tokens,))
    return Call(ops.linear_cross_entropy, [torch.randn(tokens, WIDTH), weight, labels], (0, 1))


CALLS: dict[str, Callable[[str, int | None, bool], Call]] = {
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Of the size, attention's head dimension, and whether it is a CPU that is measured."""
TUNED_HEAD_DIMS = (64, 128)
"""Wider heads, which no LLaMA has, keep the order and the tiles that ship."""


def _prepared(key: Key, device: torch.device) -> Callable[[], list[Tensor]]:
    """What is timed: calls the op, with its backward if `key` says so, and returns outputs and gradients."""
    torch.manual_seed(0)
    call, dtype = CALLS[key.op](key.size, key.head_dim, device.type == "cpu"), getattr(torch, key.dtype)
    inputs = [x.to(device, dtype if x.is_floating_point() else None) for x in call.inputs]
    if key.direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _list(call.function(*inputs))

        return forward
    wanted = [inputs[index].requires_grad_() for index in call.wanted]
    seeds: list[Tensor] = []

    def training() -> list[Tensor]:
        outputs = _list(call.function(*inputs))
        if not seeds:
            seeds.extend(torch.ones_like(x) if x.dim() == 0 else torch.randn_like(x) for x in outputs)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, seeds)]

    return training


def _list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


# ---- a race ----------------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """One that is timed: `ready` holds while it runs (it chooses the backend, or the tiles).

    Attributes:
        seconds: per call, of each round.
        failure: why it cannot take part, or why its results count for nothing.
        refused: whether that is because it cannot serve such a call at all.
    """

    ready: Callable[[], contextlib.AbstractContextManager]
    seconds: list[float] = field(default_factory=list)
    failure: str = ""
    refused: bool = False

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def noise(self) -> float:
        """Half the range between the quartiles of the seconds; 0 for a single one."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2

    def beats(self, other: Runner) -> bool:
        """Whether it was faster by more than the noise of both, and by `LEAST_GAIN`."""
        gain = other.median - self.median
        return gain > self.noise + other.noise and gain > LEAST_GAIN * other.median


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of a call, of so many one after the other."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _difference(results: list[Tensor], exact: list[Tensor], tolerance: float) -> str:
    """What is wrong with results; nothing when they are right."""
    for index, (a, b) in enumerate(zip(results, exact, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        if not error <= tolerance:
            return f"differs from the reference: relative error {error:.1e} in result {index}"
    return ""


def race(
    run: Callable[[], list[Tensor]],
    runners: dict[str, Runner],
    *,
    device: torch.device,
    seconds: float,
    tolerance: float,
    reference: str,
) -> None:
    """Times `run` under each of the runners, in turns, and fills in what they showed.

    Args:
        run: what is timed; returns its results.
        runners: by name.
        device: where `run` works.
        seconds: budget for the timed calls of one runner; calls too long for it are timed in three rounds, or twice.
        tolerance: largest relative error against the results of `reference`.
        reference: the runner that the others' results are compared with.
    """
    exact: list[Tensor] = []
    results: list[Tensor] = []
    first: dict[str, float] = {}
    slow = SLOW[device.type] * seconds
    for name in sorted(runners, key=lambda name: name != reference):
        runner = runners[name]
        try:
            with runner.ready():
                results = run()  # not timed: it may compile, and that says nothing of the calls after it
                runner.failure = _difference(results, exact, tolerance) if exact else ""
                exact = exact or results
                results = []
                if not runner.failure:
                    took = _time(run, 1, device)
                    # A short call is made again: a bad moment makes it look hopeless.
                    again = 2 if took <= slow else 0
                    first[name] = min([took, *(_time(run, 1, device) for _ in range(again))])
        except BackendError as error:
            runner.failure, runner.refused = str(error), True
        except Exception as error:  # whatever a backend fails by, the others are measured
            runner.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    exact = results = []  # gigabytes, maybe
    fastest = min(first.values(), default=0.0)
    running = {name: took for name, took in first.items() if took <= HOPELESS * fastest}
    rounds = ROUNDS if ROUNDS * fastest <= seconds else 3 if fastest <= slow else 1
    for name, took in first.items():
        if name not in running or rounds == 1:
            runners[name].seconds.append(took)
    calls = {name: max(1, int(seconds / rounds / took)) for name, took in running.items()}
    for _ in range(rounds):
        for name, number in calls.items():
            with runners[name].ready():
                runners[name].seconds.append(_time(run, number, device))


def ranked(runners: dict[str, Runner]) -> tuple[str, ...]:
    """The names in the order given, but that one passes those before it while it beats them; failed ones last."""
    order: list[str] = []
    for name, runner in runners.items():
        if runner.failure:
            continue
        place = len(order)
        while place and runner.beats(runners[order[place - 1]]):
            place -= 1
        order.insert(place, name)
    return (*order, *(name for name, runner in runners.items() if runner.failure and not runner.refused))


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a race between backends showed.

    Attributes:
        key: what was called.
        order: the backends, the fastest first.
        shipped: those of them, in the order that ships.
        microseconds: medians of those that were timed.
        notes: why others were not.
    """

    key: Key
    order: tuple[str, ...]
    shipped: tuple[str, ...]
    microseconds: dict[str, float]
    notes: list[str]


def keys(chosen_ops: Iterable[str], dtypes: Iterable[str]) -> list[Key]:
    """The calls to measure."""
    return [
        Key(op, dtype, direction, size, head_dim)
        for op in chosen_ops
        for dtype in dtypes
        for head_dim in (TUNED_HEAD_DIMS if op == "attention" else (None,))
        for size in preferences.SIZES
        for direction in preferences.DIRECTIONS
    ]


def _name(key: Key) -> str:
    head_dim = [] if key.head_dim is None else [f"head_dim {key.head_dim}"]
    return ", ".join([key.op, key.dtype, *head_dim, key.size, key.direction])


def _note(key: Key, name: str, runner: Runner) -> str:
    """Why a runner was not timed; the dispatcher's own words, which name op and backend, where it refused."""
    return runner.failure if runner.refused else f"{_name(key)}: {name}: {runner.failure}"


def measure(key: Key, device: torch.device, seconds: float) -> Result:
    """Races the backends of one call."""
    shipped = preferences.shipped_order(key.op, device.type)
    runners = {name: Runner(lambda name=name: use_backend(name)) for name in shipped}  # type: ignore[misc]
    race(
        _prepared(key, device),
        runners,
        device=device,
        seconds=seconds,
        tolerance=TOLERANCE[key.dtype],
        reference="reference",
    )
    order = ranked(runners)
    return Result(
        key,
        order,
        tuple(name for name in shipped if name in order),
        {name: 1e6 * runner.median for name, runner in runners.items() if runner.seconds},
        [_note(key, name, runner) for name, runner in runners.items() if runner.failure],
    )


def measure_tiles(
    head_dim: int, dtype: str, device: torch.device, seconds: float, report: Callable[[str], None]
) -> tuple[Tiles | None, list[str]]:
    """Tiles of attention in Triton that beat the table's on this device, and why some could not be measured.

    One product after the other, since each has a kernel of its own: the forward's is timed in forwards, the two of the
    backward in whole calls. `report` is told of each when its race is over.

    Returns:
        The tiles, None where the table's stand; and why others were not timed.
    """
    from lemur_fast.kernels import attention as kernels

    options = kernels.Options(causal=True, window=0, softcap=0.0, scale=1.0)
    q = torch.empty(1, 1, head_dim, dtype=getattr(torch, dtype), device=device)
    shipped = best = kernels.tiles_for(q, options)
    notes: list[str] = []
    for product in shipped._fields:
        direction = "forward" if product == "forward" else "training"
        tiles = [getattr(best, product), *kernels.neighbours(getattr(best, product))]
        candidates = {f"{product} {tuple(tile)}": best._replace(**{product: tile}) for tile in tiles}
        runners = {
            name: Runner(lambda found=found: _with_tiles(device, head_dim, found))  # type: ignore[misc]
            for name, found in candidates.items()
        }
        key = Key("attention", dtype, direction, "large", head_dim)
        race(
            _prepared(key, device),
            runners,
            device=device,
            seconds=seconds,
            tolerance=TOLERANCE[dtype],
            reference=next(iter(runners)),
        )
        notes += [_note(key, name, runner) for name, runner in runners.items() if runner.failure]
        best = candidates[ranked(runners)[0]]
        report(f"tiles of attention, head_dim {head_dim}, {product}")
    return (
        None if best == shipped else tuple((tile.own, tile.walked, tile.num_warps, tile.num_stages) for tile in best)
    ), notes


@contextlib.contextmanager
def _with_tiles(device: torch.device, head_dim: int, tiles: Tiles) -> Iterator[None]:
    with preferences.using(device, preferences.Table(tiles={head_dim: tiles})), use_backend("triton"):
        yield


# ---- the command -----------------------------------------------------------------------------------------------------


def tune(device: torch.device, chosen_ops: Sequence[str], dtypes: Sequence[str], seconds: float) -> str:
    """Measures, keeps the winners in the user's cache, and returns the text to print.

    Where there is no terminal for the bar, each race has a line of its own.

    Args:
        device: the one to measure; others of its model are served by the same file.
        chosen_ops: names of ops; what was measured of others before is kept.
        dtypes: names of dtypes of the main inputs.
        seconds: budget for timing one backend in one call.

    Raises:
        SystemExit: nothing can be kept, which is found out before the first race; or, after the text was printed, it
            could not be kept all the same.
    """
    began = time.perf_counter()
    try:
        preferences.check_writable(device)
    except OSError as error:
        raise SystemExit(_unkept(error)) from None
    todo = keys(chosen_ops, dtypes)
    tiles: dict[int, Tiles] = {}
    notes: dict[str, None] = {}  # in the order found, each once
    halves = [dtype for dtype in dtypes if dtype != "float32"]
    sweep = "attention" in chosen_ops and device.type == "cuda" and _triton.refuses(device, torch.bfloat16) is None
    head_dims = TUNED_HEAD_DIMS if sweep and halves else ()
    races = 3 * len(head_dims) + len(todo)
    with tqdm(desc="starting", total=races, unit="race", disable=None) as bar:
        done_before, at = 0, time.perf_counter()

        def report(done: str) -> None:
            nonlocal done_before, at
            bar.set_description(done, refresh=False)
            bar.update()
            done_before, last, at = done_before + 1, at, time.perf_counter()
            if bar.disable:
                print(f"{done_before}/{races}  {done}: {at - last:.1f} s", file=sys.stderr, flush=True)

        for head_dim in head_dims:
            found, why = measure_tiles(head_dim, halves[0], device, seconds, report)
            if found is not None:
                tiles[head_dim] = found
            notes |= dict.fromkeys(why)
        results = []
        with preferences.using(device, preferences.Table(tiles=tiles)):
            for key in todo:
                results.append(measure(key, device, seconds))
                report(_name(key))
    for result in results:
        notes |= dict.fromkeys(result.notes)
    minutes, rest = divmod(round(time.perf_counter() - began), 60)
    text = f"{_report(device, results, tiles, list(notes))}\n\nTook {minutes} min {rest} s."
    try:
        path = preferences.save(device, {result.key: result.order for result in results}, tiles)
    except OSError as error:  # the disk is full, say
        print(text, flush=True)
        raise SystemExit(_unkept(error)) from None
    return f"{text} Kept in {path}; delete it to go back to what ships."


def _unkept(error: OSError) -> str:
    return f"python -m lemur_fast tune: nothing can be kept in {preferences.folder()}: {error.strerror or error}"


def _report(device: torch.device, results: list[Result], tiles: dict[int, Tiles], notes: list[str]) -> str:
    names = [name for name in preferences.BACKENDS if any(name in result.microseconds for result in results)]
    rows = [["op", "dtype", "size", "", *(f"{name}, us" for name in names), "order"]]
    for result in results:
        op = result.key.op if result.key.head_dim is None else f"{result.key.op}, head_dim {result.key.head_dim}"
        times = [f"{result.microseconds[name]:,.1f}" if name in result.microseconds else "-" for name in names]
        changed = "" if result.order == result.shipped else f"  (shipped: {', '.join(result.shipped)})"
        order = ", ".join(result.order) + changed
        rows.append([op, result.key.dtype, result.key.size, result.key.direction, *times, order])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{_devices.model(device)}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads", ""]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if 4 <= place < len(row) - 1 else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    changed_orders = sum(result.order != result.shipped for result in results)
    lines += ["", f"{changed_orders} of {len(results)} orders differ from those that ship."]
    lines += [f"attention, head_dim {dim}: tiles (forward, dkdv, dq) {found}" for dim, found in tiles.items()]
    if notes:
        lines += ["", "Not measured:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)
