"""Broken machine code is noticed: mutants of the kernels' PTX, judged as the kernels themselves are.

``python -m pytest -m "" tests/kernels/test_mutations.py`` tests; ``python -m tests.kernels.test_mutations`` prints the
score. A mutant is caught by a `Fault` of `tests.ptxsim` or by a result that the ordinary criterion refuses. One that is
no valid program (`Unsupported`) does not count at all.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.ahead_of_time import Launch, recording
from benchmarks.gpu_static import TRITON, Kernels
from lemur_fast.kernels import attention, rms_norm
from tests.conftest import INTERPRETING
from tests.criterion import assert_as_good
from tests.cuda.simulated import CudaLaunch
from tests.dense import bounds
from tests.kernels.mutations import KINDS, Mutant, mutants
from tests.kernels.test_rows import losses, norm_gradients, rotated, rows_of
from tests.ptxsim import Counts, Fault, Unsupported
from tests.ptxsim.from_triton import execute

pytestmark = pytest.mark.skipif(INTERPRETING, reason="mutates machine code, which the interpreter has none of")

ARCHITECTURES = ["sm_80", "sm_90"]
SYNCHRONISATION = tuple(kind for kind in KINDS if re.match("barrier|copies|wgmma|proxy", kind))
"""Kinds of which every place is taken."""


Arguments = dict[str, Tensor]


@dataclass
class Trial:
    """A launch to mutate.

    Attributes:
        kernel: its name.
        outputs: the arguments that it writes.
        check: tests what it wrote, given all its arguments by name.
        launch: the launch.
    """

    kernel: str
    outputs: tuple[str, ...]
    check: Callable[[Arguments], None]
    launch: Launch | CudaLaunch

    @property
    def ptx(self) -> str:
        """The program."""
        return self.launch.ptx if isinstance(self.launch, CudaLaunch) else self.launch.compiled.asm["ptx"]

    @property
    def warps(self) -> int:
        """Of a block."""
        if isinstance(self.launch, CudaLaunch):
            return math.prod(self.launch.block) // 32
        return self.launch.compiled.metadata.num_warps

    def execute(self, ptx: str | None, most_steps: int) -> Counts:
        """Runs a program in place of the launch's own, on its tensors."""
        if isinstance(self.launch, CudaLaunch):
            return self.launch.execute(ptx, most_steps)
        return execute(self.launch, ptx, most_steps)


# ---- what is launched ------------------------------------------------------------------------------------------------
# Sizes are no multiples of blocks, strides differ from each other, and every loop turns more than once.


def norm_trials(
    kernels: Kernels,
    architecture: str,
    launches: list,
    sizes: int,
    shapes: tuple[tuple[int, int], ...] = ((17, 300), (41, 492)),
    strides: tuple[int, ...] = (8, 18, 28, 38),
) -> list[Trial]:
    rows, cols = shapes[sizes]
    x, residual, dy, dh = (rows_of(rows, cols, torch.bfloat16, 1, apart)[0] for apart in strides)
    weight = torch.randn(cols).bfloat16()
    _, h, rstd = (result.clone() for result in kernels.rms_norm.forward(x, residual, weight, 1e-5))
    with kernels.processors(architecture, 2):
        kernels.rms_norm.backward(dy, dh, h, weight, rstd, True)
    if kernels is TRITON:
        many = torch.randn([33, 61][sizes], cols)
        rms_norm.sum_rows(many)
    else:  # whose sum is a part of the backward: as many parts as can be had of these rows
        ones = torch.ones(250, cols)
        with kernels.processors(architecture, len(ones)):
            kernels.rms_norm.backward(ones, None, ones, weight.float(), torch.ones(len(ones)), True)
        of_sum = launches[-1].arguments
        many = of_sum["x"].copy_(torch.randn(of_sum["x"].shape))[: of_sum["rows"]]
    exact = (h.double().square().mean(-1) + 1e-5).rsqrt()
    stock_dx, exact_dx = (
        norm_gradients(*tensors)[0]
        for tensors in ((dy, dh, h, weight.float()), (dy.double(), dh.double(), h.double(), weight.double()))
    )
    # Which way an element is rounded hangs on the last bit of rstd.
    x_hat = (h.float() * rstd[:, None]).bfloat16()
    stock_dw, exact_dw = (dy.float() * x_hat.float()).sum(0), (dy.double() * x_hat.double()).sum(0)

    def forward(got: Arguments) -> None:
        assert torch.equal(got["h"], x + residual)
        torch.testing.assert_close(got["rstd"].double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(got["y"], (h.float() * got["rstd"][:, None]).bfloat16() * weight)

    def backward(got: Arguments) -> None:
        assert_as_good("dx", got["dx"], stock_dx, exact_dx, floor=2**-20)
        assert_as_good("dw", got["partial"][: launches[1].grid[0]].sum(0), stock_dw, exact_dw, floor=2**-16)

    def total(got: Arguments) -> None:
        assert_as_good("total", got["total"], many.sum(0), many.double().sum(0), floor=2**-16)

    return [
        Trial("rms_norm forward", ("y", "h", "rstd"), forward, launches[0]),
        Trial("rms_norm backward", ("dx", "partial"), backward, launches[1]),
        Trial("rms_norm sum of rows", ("total",), total, launches[-1]),
    ]


def cross_entropy_trials(
    kernels: Kernels,
    architecture: str,
    launches: list,
    sizes: int,
    widths: tuple[int, ...] = (4107, 8001),
    apart: tuple[int, int] = (9, 11),
) -> list[Trial]:
    """A row whose exponentials overflow unless its maximum is taken off, labels from nowhere, and ordinary rows."""
    options = {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 60.0}
    cols = widths[sizes]
    spread = torch.tensor([70.0, 4.0, 4.0, 15.0, 4.0, 4.0])[:, None]
    logits, dlogits = (spread * torch.randn(6, cols + apart[0]))[:, :cols], torch.empty(6, cols + apart[1])[:, :cols]
    # Many of the largest where the softcap's polynomial has its last terms.
    logits[3] = torch.where(torch.rand(cols) < 1 / 40, 33 + 2 * torch.randn(cols), -50.0)
    logits[3, cols - 1] = 33.0  # its label's, too
    labels, dloss = torch.tensor([5, -100, 0, cols - 1, -1, cols]), torch.randn(6)
    forward_of = kernels.cross_entropy.forward
    _, lse, *_ = (result.clone() for result in forward_of(logits, labels, True, dloss, dlogits, **options))
    kernels.cross_entropy.backward(dloss, logits, labels, lse, **options)
    known = labels.clamp(-100, cols - 1).where(labels != -1, 0)
    stock = losses(logits, known, dloss, **options)
    exact = losses(logits.double(), known, dloss.double(), **options)
    good, trained = torch.arange(4), torch.tensor([0, 2, 3])
    capped = 60 * torch.tanh(logits.double() / 60)
    distribution = torch.distributions.Categorical(logits=capped)

    def gradient(got: Arguments) -> None:
        assert_as_good("dlogits", got["dlogits"][good], stock[2][good], exact[2][good], floor=2**-20)
        assert got["dlogits"][4:].isnan().all()

    def forward(got: Arguments) -> None:
        for at, name in enumerate(("loss", "lse")):
            assert_as_good(name, got[name][good], stock[at][good].float(), exact[at][good], floor=2**-20)
        assert got["loss"][4:].isnan().all()
        gradient(got)
        entropy, log_prob = distribution.entropy()[trained], distribution.log_prob(known.clamp(min=0))[trained]
        torch.testing.assert_close(got["entropy"][trained].double(), entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["log_prob"][trained].double(), log_prob, rtol=1e-5, atol=1e-5)
        best = capped.gather(-1, known.clamp(min=0)[:, None])[:, 0] >= capped.amax(-1)
        assert got["correct"].view(torch.uint8)[trained].equal(best[trained].view(torch.uint8))
        assert not any(got[name][1] for name in ("log_prob", "entropy", "correct"))

    written = ("loss", "lse", "log_prob", "entropy", "correct", "dlogits")
    return [
        Trial("cross_entropy forward", written, forward, launches[0]),
        Trial("cross_entropy backward", ("dlogits",), gradient, launches[1]),
    ]


def swiglu_trials(
    kernels: Kernels,
    architecture: str,
    launches: list,
    sizes: int,
    widths: tuple[int, ...] = (2051, 4091),
    strides: tuple[int, ...] = (1, 2, 3),
) -> list[Trial]:
    cols = widths[sizes]
    dy, gate, up = (rows_of(3, cols, torch.bfloat16, 1, apart)[0] for apart in strides)

    def formula(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), dy)

    kernels.swiglu.backward(dy, gate, up)
    stock, exact = formula(gate, up, dy), formula(gate.double(), up.double(), dy.double())

    def check(got: Arguments) -> None:
        for at, name in enumerate(("dgate", "dup")):
            assert_as_good(name, got[name], stock[at], exact[at])

    return [Trial("swiglu backward", ("dgate", "dup"), check, launches[0])]


def rotary_trials(
    kernels: Kernels,
    architecture: str,
    launches: list,
    sizes: int,
    shapes: tuple[tuple[int, int, int], ...] = ((5, 7, 3), (8, 7, 3)),
) -> list[Trial]:
    tokens, q_heads, k_heads = shapes[sizes]
    q = torch.randn(tokens, q_heads, 96).bfloat16()[..., :80]
    k = torch.randn(tokens, k_heads, 112).bfloat16()[..., :80]
    cos, sin = torch.randn(tokens, 96).bfloat16()[:, :80], torch.randn(tokens, 112).bfloat16()[:, :80]
    kernels.rotary.rotate(q, k, cos, sin, False, torch.bfloat16, True)
    stock = {f"{name}_out": rotated(x, cos, sin, False, True) for name, x in (("q", q), ("k", k))}
    exact = {f"{name}_out": rotated(x, cos.double(), sin.double(), False, True) for name, x in (("q", q), ("k", k))}

    def check(got: Arguments) -> None:
        for name in exact:
            assert_as_good(name, got[name], stock[name], exact[name])

    return [Trial("rotary", ("q_out", "k_out"), check, launches[0])]


def attended(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float
) -> Arguments:
    """Causal attention of each document with one key head, and its gradients, whose delta is of the rounded `out`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    delta = (out.to(wide) * dout.to(wide)).sum(-1).T
    exact = {"out": q, "dq": q, "dk": k, "dv": v}
    exact = {name: torch.zeros(like.shape, dtype=wide) for name, like in exact.items()}
    lse = torch.full(delta.shape, -torch.inf, dtype=wide)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        query, key, value, g = (x.to(wide) for x in (q[a:b], k[c:d, 0], v[c:d, 0], dout[a:b]))
        places = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        scores = (scale * torch.einsum("qhd,kd->hqk", query, key)).masked_fill(torch.arange(d - c) > places, -torch.inf)
        lse[:, a:b] = torch.logsumexp(scores, -1)
        p = torch.exp(scores - lse[:, a:b, None]).nan_to_num(0.0)
        ds = p * (torch.einsum("qhd,kd->hqk", g, value) - delta[:, a:b, None])
        exact["out"][a:b] = torch.einsum("hqk,kd->qhd", p, value)
        exact["dq"][a:b] = scale * torch.einsum("hqk,kd->qhd", ds, key)
        exact["dk"][c:d, 0] = scale * torch.einsum("hqk,qhd->kd", ds, query)
        exact["dv"][c:d, 0] = torch.einsum("hqk,qhd->kd", p, g)
    return {name: x.to(q.dtype) for name, x in exact.items()} | {"lse": lse, "delta": delta}


def attention_trials(
    kernels: Kernels, architecture: str, launches: list, sizes: int, forward_alone: bool = False
) -> list[Trial]:
    """Head dimension 64, causal: an empty document, shorter and longer ones than a tile, and a tail of NaN.

    Or no tail, and a last document that ends within a tile, or one shorter than any block. The scores of one head
    overflow unless their maximum is taken off.
    """
    cu_q, cu_k, tail = [
        (bounds(5, 0, 170, 10), bounds(5, 7, 290, 200), 3),
        (bounds(70, 130), bounds(64, 130), 0),
        (bounds(9), bounds(5), 0),
    ][sizes]
    options = attention.Options(causal=True, window=0, softcap=0.0, scale=0.25)
    queries, keys = int(cu_q[-1]) + tail, int(cu_k[-1]) + tail
    q = torch.randn(queries, 2, 80).bfloat16()[..., :64]
    q[:, 0] *= 300
    k, v = (torch.randn(keys, 2, width).bfloat16()[:, :1, :64] for width in (96, 112))
    dout = torch.randn(queries, 2, 128).bfloat16()[..., :64]
    clean = [x.clone() for x in (q, k, v, dout)]
    for x in (q, k, v):
        x[len(x) - tail :] = float("nan")
    out, lse = (result.clone() for result in attention.forward(q, k, v, cu_q, cu_k, options))
    if not forward_alone:
        attention.backward(dout, None, q, k, v, out, lse, cu_q, cu_k, options)

    stock = attended(*clean, out, cu_q, cu_k, 0.25)
    exact = attended(*(x.double() for x in (*clean, out)), cu_q, cu_k, 0.25)

    def writes(kernel: str, launch: Launch, *outputs: str) -> Trial:
        def check(got: Arguments) -> None:
            for name in outputs:
                floor = 2**-18 if name in ("lse", "delta") else 2**-9
                assert_as_good(name, got[name], stock[name], exact[name], floor=floor)

        return Trial(f"attention {kernel}", outputs, check, launch)

    if forward_alone:
        return [writes("forward", launches[0], "out", "lse")]
    return [
        writes("forward", launches[0], "out", "lse"),
        writes("delta", launches[1], "delta"),
        writes("dq", launches[2], "dq"),
        writes("dkdv", launches[3], "dk", "dv"),
    ]


OPS = {
    "rms_norm": norm_trials,
    "cross_entropy": cross_entropy_trials,
    "swiglu": swiglu_trials,
    "rotary": rotary_trials,
    "attention": attention_trials,
    "attention forward": functools.partial(attention_trials, forward_alone=True),
}


def trials_of(op: str, architecture: str) -> list[list[Trial]]:
    """Runs an op with two or three kinds of sizes, and returns its launches: those of each kernel are one program."""
    found = []
    for sizes in range(3 if op.startswith("attention") else 2):
        torch.manual_seed(0)
        with recording(architecture, execute) as launches:
            found.append(OPS[op](TRITON, architecture, launches, sizes))
    by_kernel = [list(trials) for trials in zip(*found, strict=True)]
    for first, *others in by_kernel:
        for other in others:
            assert first.ptx == other.ptx, first.kernel
    return by_kernel


# ---- mutants ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a mutant: "fault", "result", "survived" or "invalid", and what was said."""

    mutant: Mutant
    how: str
    message: str = ""


class Bench:
    """Runs a launch again and again, with other programs."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.tensors = {name: v for name, v in trial.launch.arguments.items() if isinstance(v, Tensor)}
        self.before = {name: v.clone() for name, v in self.tensors.items()}
        counts = self.run(None, 20_000_000)
        self.most_steps = 4 * sum(counts.instructions.values()) // trial.warps

    def restore(self) -> None:
        """Gives all tensors the values that they had: other launches may read what this one writes."""
        for name, v in self.tensors.items():
            v.copy_(self.before[name])

    def run(self, ptx: str | None, most_steps: int) -> Counts:
        """Runs a program on the same tensors, with NaN where it writes, and tests what it wrote."""
        self.restore()
        for name in self.trial.outputs:
            v = self.tensors[name]
            v.fill_(float("nan")) if v.is_floating_point() else v.view(torch.uint8).fill_(0xEE)
        counts = self.trial.execute(ptx, most_steps)
        self.trial.check(self.tensors)
        return counts


def mutants_of(
    trials: list[Trial], kinds: Callable[[str], bool] = lambda kind: kind != "branch widened"
) -> list[Mutant]:
    """The mutants of a kernel that are tried. Branches are left alone where, as in Triton's, masks are the guards."""
    return mutants(trials[0].ptx, 6, kinds, SYNCHRONISATION)


def outcomes(trials: list[Trial], made: list[Mutant]) -> Iterator[Outcome]:
    """Runs the launches with each mutant in place of their program, until one of them catches it."""
    benches = [Bench(trial) for trial in trials]
    for mutant in made:
        try:
            for bench in benches:
                bench.run(mutant.ptx, bench.most_steps)
            yield Outcome(mutant, "survived")
        except Fault as fault:
            yield Outcome(mutant, "fault", str(fault).split("\n")[0])
        except AssertionError as wrong:
            yield Outcome(mutant, "result", str(wrong).split("\n")[0])
        except Unsupported as refused:
            yield Outcome(mutant, "invalid", str(refused))
    for bench in benches:
        bench.restore()


# ---- the score -------------------------------------------------------------------------------------------------------

COMPILER = "3.8.0"
"""What compiled the programs of `SURVIVORS`."""

BARRIER = "two rounds of cp.async begin, one before and one after it: nothing in between reads or rewrites their memory"
AFTER_LOOP = "after a loop whose last turn ended with one: nothing was read since, and a thread refills its own places"
BARRIERS_80 = f"{BARRIER} (2); {AFTER_LOOP} (2)"
SECOND_BARRIER = "right after another"
BARRIERS_DKDV = f"{BARRIER} (2); {AFTER_LOOP} (2); {SECOND_BARRIER} (1)"
LAST_WAIT = "after the last turn: the round that is left in flight copies into memory that nothing uses any more"
COMMIT = "in the first round: its copies join the next group of the same round, and are waited for no later"
WGMMA_FENCE = "no instruction touches the product's registers between the fence before it and this one"
PROXY_FENCE = "another stands between the store and wgmma; without all of them there is a fault"
COLUMNS = "columns that every row has: BLOCK is the next power of two, so these are below cols whatever it is"
SAME_STORE = "one thread is to store, and all of them have the same value"
SAME_COPY = "the threads that are left out would copy the same words to the same places as those that copy"
CAUSAL = "key < keys: the causal mask, or the store, leaves out these keys all the same"
KEY_HEAD = "there is one key head: its stride is multiplied by 0"
EQUAL = "dlogits is contiguous: its stride is cols, the neighbour"
LOG = "log2 of infinity or NaN: no row has such a sum"
MAXIMUM = "any base gives the same log-sum-exp, unless it overflows or the row's greatest passes this place"

SURVIVORS: dict[tuple[str, str, str], tuple[int, str]] = {
    ("sm_80", "rms_norm forward", "guard removed"): (2, COLUMNS),
    ("sm_80", "cross_entropy forward", "guard removed"): (1, SAME_STORE),
    ("sm_80", "cross_entropy forward", "maximum"): (3, MAXIMUM),
    ("sm_80", "cross_entropy backward", "neighbouring parameter"): (1, EQUAL),
    ("sm_80", "attention forward", "barrier deleted"): (4, BARRIERS_80),
    ("sm_80", "attention forward", "copies: wait loosened by one"): (1, LAST_WAIT),
    ("sm_80", "attention forward", "copies: wait deleted"): (1, LAST_WAIT),
    ("sm_80", "attention forward", "copies: commit deleted"): (2, COMMIT),
    ("sm_80", "attention forward", "mask widened"): (1, CAUSAL),
    ("sm_80", "attention forward", "neighbouring parameter"): (2, KEY_HEAD),
    ("sm_80", "attention forward", "addend dropped"): (2, LOG),
    ("sm_80", "attention dq", "barrier deleted"): (2, AFTER_LOOP),
    ("sm_80", "attention dq", "copies: wait loosened by one"): (1, LAST_WAIT),
    ("sm_80", "attention dq", "copies: wait deleted"): (1, LAST_WAIT),
    ("sm_80", "attention dq", "mask widened"): (1, CAUSAL),
    ("sm_80", "attention dq", "factor of an address"): (1, KEY_HEAD),
    ("sm_80", "attention dkdv", "barrier deleted"): (5, BARRIERS_DKDV),
    ("sm_80", "attention dkdv", "copies: commit deleted"): (6, COMMIT),
    ("sm_80", "attention dkdv", "mask widened"): (1, CAUSAL),
    ("sm_80", "attention dkdv", "factor of an address"): (1, KEY_HEAD),
    ("sm_90", "rms_norm forward", "guard removed"): (2, COLUMNS),
    ("sm_90", "cross_entropy forward", "guard removed"): (1, SAME_STORE),
    ("sm_90", "cross_entropy forward", "maximum"): (3, MAXIMUM),
    ("sm_90", "cross_entropy backward", "neighbouring parameter"): (1, EQUAL),
    ("sm_90", "attention forward", "barrier deleted"): (2, BARRIER),
    ("sm_90", "attention forward", "copies: wait loosened by one"): (1, LAST_WAIT),
    ("sm_90", "attention forward", "copies: commit deleted"): (2, COMMIT),
    ("sm_90", "attention forward", "proxy fence deleted"): (4, PROXY_FENCE),
    ("sm_90", "attention forward", "mask widened"): (1, CAUSAL),
    ("sm_90", "attention forward", "neighbouring parameter"): (2, KEY_HEAD),
    ("sm_90", "attention forward", "addend dropped"): (2, LOG),
    ("sm_90", "attention dq", "barrier deleted"): (1, AFTER_LOOP),
    ("sm_90", "attention dq", "copies: wait loosened by one"): (1, LAST_WAIT),
    ("sm_90", "attention dq", "copies: wait deleted"): (1, LAST_WAIT),
    ("sm_90", "attention dq", "wgmma: fence deleted"): (2, WGMMA_FENCE),
    ("sm_90", "attention dq", "proxy fence deleted"): (4, PROXY_FENCE),
    ("sm_90", "attention dq", "mask widened"): (1, CAUSAL),
    ("sm_90", "attention dkdv", "barrier deleted"): (1, SECOND_BARRIER),
    ("sm_90", "attention dkdv", "wgmma: fence deleted"): (2, WGMMA_FENCE),
    ("sm_90", "attention dkdv", "proxy fence deleted"): (3, PROXY_FENCE),
    ("sm_90", "attention dkdv", "guard removed"): (2, SAME_COPY),
    ("sm_90", "attention dkdv", "mask widened"): (1, CAUSAL),
}
"""Mutants that nothing catches, by architecture, kernel and kind: how many, and why; each was read in the PTX."""

LEAST = 0.85
"""Share of a kernel's mutants that is caught."""


def survivors_of(architecture: str, kernel: str, found: list[Outcome]) -> Counter[str]:
    """How many of each kind survived; fails where another number is listed."""
    survived = Counter(outcome.mutant.kind for outcome in found if outcome.how == "survived")
    if triton.__version__ == COMPILER:
        made = {outcome.mutant.kind for outcome in found}
        listed = {
            kind: count
            for (a, k, kind), (count, _) in SURVIVORS.items()
            if (a, k) == (architecture, kernel) and kind in made
        }
        assert dict(survived) == listed, "\n".join([kernel, *(str(o) for o in found if o.how == "survived")])
    return survived


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", [op for op in OPS if op != "attention forward"])
def test_mutants_are_caught(op, architecture):
    for trials in trials_of(op, architecture):
        found = list(outcomes(trials, mutants_of(trials)))
        survived = survivors_of(architecture, trials[0].kernel, found).total()
        valid = sum(outcome.how != "invalid" for outcome in found)
        assert valid >= 30
        assert valid - survived >= LEAST * valid, f"{trials[0].kernel}: {survived} of {valid} survived"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_missing_synchronisation_is_caught(architecture):
    """The barriers, waits and fences of one kernel; the slow test has the rest."""
    (trials,) = trials_of("attention forward", architecture)
    made = mutants_of(trials, lambda kind: re.match("barrier|proxy|.*(fence deleted|loosened)", kind) is not None)
    found = list(outcomes(trials, made))
    survivors_of(architecture, trials[0].kernel, found)
    caught = Counter(outcome.mutant.kind for outcome in found if outcome.how != "survived")
    assert set(caught) >= {outcome.mutant.kind for outcome in found} - {"proxy fence deleted"}
    assert all(outcome.how in ("fault", "survived") for outcome in found)


def main() -> None:
    """Prints, for every kernel and kind, how many mutants a fault caught, a wrong result caught, and nothing caught."""
    torch.use_deterministic_algorithms(True)
    for architecture in ARCHITECTURES:
        found: dict[str, list[Outcome]] = {}
        for op in OPS:
            for trials in trials_of(op, architecture) if op != "attention forward" else ():
                kernel = trials[0].kernel
                found[kernel] = list(outcomes(trials, mutants_of(trials)))
                print_survivors(kernel, found[kernel])
        print_table(f"{architecture}, Triton {triton.__version__}", found)


def print_survivors(kernel: str, found: list[Outcome]) -> None:
    """Prints what nothing caught."""
    for m in (outcome.mutant for outcome in found if outcome.how == "survived"):
        print(f"- {kernel}, {m.kind}: {m.source}, line {m.number}: `{m.before[:90]}` -> `{m.after[:90]}`")


def print_table(what: str, found: dict[str, list[Outcome]]) -> None:
    """Prints the outcomes of every kernel, in Markdown."""
    print(f"\n{what}: by a fault / by a wrong result / survived\n")
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for kind in [*KINDS, "all"]:
        row = []
        for results in found.values():
            counted = Counter(outcome.how for outcome in results if kind in (outcome.mutant.kind, "all"))
            numbers = [counted[how] for how in ("fault", "result", "survived")]
            row.append(" / ".join(map(str, numbers)) if any(numbers) else "")
        print(f"| {kind} | {' | '.join(row)} |")
    every = Counter(outcome.how for results in found.values() for outcome in results)
    valid = every.total() - every["invalid"]
    caught = valid - every["survived"]
    print(
        f"\n{caught} of {valid} caught ({caught / valid:.1%}); {every['invalid']} more are no programs.\n", flush=True
    )


if __name__ == "__main__":
    main()
