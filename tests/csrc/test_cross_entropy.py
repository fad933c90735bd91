"""The cross-entropy kernels of every instruction set this CPU has, on raw memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lemur_fast import _compiled
from lemur_fast._compiled import dtype_code
from tests.criterion import assert_as_good
from tests.csrc.raw import DTYPES, WIDTHS, Output, strided

C = _compiled.C
INF, NAN = float("inf"), float("nan")
IGNORED = -100
PLAIN: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
OPTIONS = [PLAIN, PLAIN | {"label_smoothing": 0.1, "z_loss": 1e-2}, PLAIN | {"softcap": 3.0, "z_loss": 1e-3}]


class Result(NamedTuple):
    loss: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    correct: Tensor
    dlogits: Tensor


def forward(logits: Tensor, labels: Tensor, dloss: Tensor | None = None, options: dict[str, Any] = PLAIN) -> Result:
    rows, cols = logits.shape
    loss, lse, log_prob, entropy = (Output((rows,), torch.float32) for _ in range(4))
    correct = torch.empty(rows, dtype=torch.bool)
    dlogits = Output((rows, cols), logits.dtype)
    C.cpu.cross_entropy_fwd(
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        labels=labels.data_ptr(),
        loss=loss.data_ptr(),
        lse=lse.data_ptr(),
        log_prob=log_prob.data_ptr(),
        entropy=entropy.data_ptr(),
        correct=correct.data_ptr(),
        dloss=0 if dloss is None else dloss.data_ptr(),
        dlogits=dlogits.data_ptr(),
        rows=rows,
        cols=cols,
        dtype=dtype_code(logits.dtype),
        **options,
    )
    return Result(loss.written(), lse.written(), log_prob.written(), entropy.written(), correct, dlogits.written())


def backward(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, options: dict[str, Any] = PLAIN) -> Tensor:
    dlogits = Output(logits.shape, logits.dtype)
    C.cpu.cross_entropy_bwd(
        dloss=dloss.data_ptr(),
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        labels=labels.data_ptr(),
        lse=lse.data_ptr(),
        dlogits=dlogits.data_ptr(),
        rows=logits.shape[0],
        cols=logits.shape[1],
        dtype=dtype_code(logits.dtype),
        **options,
    )
    return dlogits.written()


def formula(logits: Tensor, labels: Tensor, dloss: Tensor, options: dict[str, Any]) -> Result:
    """The same by torch's own loss and autograd, in the dtype of the logits, but at least in float32."""
    logits = logits.detach().requires_grad_()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = options["softcap"] * torch.tanh(wide / options["softcap"]) if options["softcap"] else wide
    trained = labels != options["ignore_index"]
    lse = torch.logsumexp(x, -1)
    loss = functional.cross_entropy(x, labels, label_smoothing=options["label_smoothing"], reduction="none")
    loss = loss + torch.where(trained, options["z_loss"] * lse.square(), 0.0)
    (dlogits,) = torch.autograd.grad(loss, logits, dloss.to(loss.dtype))
    of_label = x.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    stats = lse, of_label - lse, torch.distributions.Categorical(logits=x, validate_args=False).entropy()
    return Result(
        loss.detach(),
        *(torch.where(trained, s.detach(), 0.0) for s in stats),
        trained & (x.argmax(-1) == labels),
        dlogits,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smooth", "softcap"])
def test_against_float64(isa, dtype, options):
    generator = torch.Generator().manual_seed(0)
    # 1023 to 2049: around the blocks in which a row is read
    for cols in (*WIDTHS, 1023, 1024, 1025, 2049):
        logits = strided(6, cols, dtype, generator)
        logits.mul_(4)
        labels = torch.randint(0, cols, (6,), generator=generator)
        labels[2] = IGNORED
        labels[3] = logits[3].argmax()
        dloss = torch.randn(6, generator=generator)
        ours = forward(logits, labels, dloss, options)
        stock = formula(logits, labels, dloss, options)
        exact = formula(logits.double(), labels, dloss.double(), options)
        # The gradient of a label is a difference of terms as large as dloss, of which one has the rounding of lse.
        floors = {"dlogits": 2**-22 * float(dloss.abs().max())}
        for name in ("loss", "lse", "log_prob", "entropy", "dlogits"):
            triple = (getattr(result, name) for result in (ours, stock, exact))
            assert_as_good(f"{name} of {cols}", *triple, floor=floors.get(name, 2**-22))
        assert torch.equal(ours.correct, exact.correct)
        assert torch.equal(backward(dloss, logits, labels, ours.lse, options), ours.dlogits)


def test_the_gradient_may_overwrite_the_logits(isa):
    logits, labels, dloss = torch.randn(4, 1001).bfloat16(), torch.tensor([5, IGNORED, 0, 1000]), torch.randn(4)
    apart = forward(logits, labels, dloss)
    lse, loss = torch.empty(4), torch.empty(4)
    C.cpu.cross_entropy_fwd(
        logits=logits.data_ptr(),
        logits_stride=1001,
        labels=labels.data_ptr(),
        loss=loss.data_ptr(),
        lse=lse.data_ptr(),
        log_prob=0,
        entropy=0,
        correct=0,
        dloss=dloss.data_ptr(),
        dlogits=logits.data_ptr(),
        rows=4,
        cols=1001,
        dtype=dtype_code(logits.dtype),
        **PLAIN,
    )
    assert torch.equal(logits, apart.dlogits)
    assert torch.equal(loss, apart.loss)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size(isa, dtype):
    """exp neither overflows nor is its argument clamped: rows that are shifted have the same loss."""
    big = torch.finfo(dtype).max
    rows = [
        [big, -big, 0.0, 1.0],
        [-big, -big, -big, -big],
        [big, big, big, big],
        [0.0, -INF, -INF, 0.0],
        [-INF, -INF, 5.0, -INF],
        [88.0, 89.0, 90.0, -200.0],
        [-1000.0, -1001.0, -1002.0, -1100.0],
    ]
    logits, labels = torch.tensor(rows).to(dtype), torch.tensor([0, 1, 2, 3, 2, 0, 0])
    got, want = forward(logits, labels), formula(logits.double(), labels, torch.ones(7), PLAIN)
    # a log-sum-exp as large as the logits is rounded as coarsely as they are
    scale = logits.double().nan_to_num(neginf=0.0).abs().amax(-1)
    for name in ("loss", "lse", "log_prob"):
        ours, exact = getattr(got, name), getattr(want, name)
        assert ((ours.double() - exact).abs() <= 2**-23 * (scale + exact.abs() + 1)).all(), name
    # and what its rounding loses is a factor of all probabilities: nothing is left of those of the largest rows
    assert got.dlogits.isfinite().all()
    left = 2 * torch.finfo(dtype).eps + 2**-23 * scale[:, None]
    assert ((got.dlogits.double() - want.dlogits).abs() <= left).all()
    # torch's entropy is NaN where a logit is -inf; these are known
    known = torch.tensor([0.0, 2 * 0.6931472, 2 * 0.6931472, 0.6931472, 0.0])
    torch.testing.assert_close(got.entropy[:5], known, rtol=1e-6, atol=1e-6)
    assert got.correct.tolist() == [True, True, True, True, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 700, 1500, 2499])
def test_bad_rows_are_nan_as_in_torch_and_spoil_no_other(isa, dtype, at):
    logits, labels = torch.randn(5, 2500).to(dtype), torch.tensor([3, 4, 5, 6, 7])
    good = forward(logits, labels)
    logits[1, at] = NAN
    logits[2, at] = INF
    logits[3, :] = -INF
    got = forward(logits, labels)
    assert got.loss.isnan().tolist() == [False, True, True, True, False]
    assert got.loss.isnan().tolist() == formula(logits.float(), labels, torch.ones(5), PLAIN).loss.isnan().tolist()
    assert got.dlogits[1:4].isnan().any(-1).all()
    for name in Result._fields:
        assert torch.equal(getattr(got, name)[[0, 4]], getattr(good, name)[[0, 4]])


def test_minus_infinity_up_to_any_block_is_a_mask(isa):
    """Whole blocks of masked logits before the first that counts."""
    for masked in (1, 1023, 1024, 1025, 2050, 2499):
        logits = torch.randn(1, 2500)
        logits[0, :masked] = -INF
        got = forward(logits, torch.tensor([2499]))
        alone = forward(logits[:, masked:].contiguous(), torch.tensor([2499 - masked]))
        torch.testing.assert_close(got.loss, alone.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.entropy, alone.entropy, rtol=1e-5, atol=1e-6)
        assert (got.dlogits[0, :masked] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*OPTIONS[:2], PLAIN | {"softcap": 30.0}], ids=["plain", "smooth", "softcap"])
def test_logits_far_above_the_first_block(isa, dtype, options):
    """The kernel takes the first block's largest for the row's, and must notice where it is not."""
    logits = torch.randn(7, 5000)
    logits[0] += torch.linspace(-60, 60, 5000)
    logits[1] += torch.linspace(60, -60, 5000)
    logits[2, 1500] = 50.0
    logits[3, 4999] = 300.0
    logits[4, :1024] = -1e4
    logits[5, 1024:2048] += 7.0  # in reach of the first block's
    logits[6] += torch.linspace(0, 1e4, 5000)
    logits, labels = logits.to(dtype), torch.tensor([0, 4999, 7, 4999, 0, 1030, 0])
    dloss = torch.ones(7)
    for row in range(7):  # one by one: a tensor's tolerance is in proportion to its largest
        one = logits[row : row + 1], labels[row : row + 1], dloss[row : row + 1], options
        ours, stock = forward(*one), formula(*one)
        exact = formula(one[0].double(), *one[1:])
        scale = float(one[0].float().clamp(min=0).max())
        for name in ("loss", "lse", "log_prob", "entropy"):
            triple = (getattr(result, name) for result in (ours, stock, exact))
            assert_as_good(f"{name} of row {row}", *triple, floor=2**-22)
        assert_as_good(f"dlogits of row {row}", ours.dlogits, stock.dlogits, exact.dlogits, floor=2**-23 * (2 + scale))
        assert torch.equal(ours.correct, exact.correct)


def test_no_rows_and_expanded_rows(isa):
    none = forward(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert [part.numel() for part in none] == [0] * 6
    logits, labels = torch.randn(1, 50).expand(4, 50), torch.arange(4)
    for got, want in zip(forward(logits, labels), forward(logits.contiguous(), labels), strict=True):
        assert torch.equal(got, want)


def test_the_same_bits_for_any_number_of_threads(isa, threads):
    logits, labels, dloss = torch.randn(100, 2500).bfloat16(), torch.randint(0, 2500, (100,)), torch.randn(100)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(forward(logits, labels, dloss))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows: got -1"),
        ({"cols": 0}, "cols: got 0; must be at least 1"),
        ({"logits": 0}, "logits: got a null pointer"),
        ({"labels": 0}, "labels: got a null pointer"),
        ({"loss": 0}, "loss: got a null pointer"),
        ({"lse": 0}, "lse: got a null pointer"),
        ({"log_prob": 8}, "entropy: got a null pointer"),
        ({"ignore_index": 3}, "labels: got -100 at position 1; takes 0 to 3, or ignore_index 3"),
        ({"dtype": 7}, "dtype: got 7"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    x, labels = torch.ones(2, 4), torch.tensor([3, IGNORED])
    arguments = {"logits": x.data_ptr(), "logits_stride": 4, "labels": labels.data_ptr(), "loss": x.data_ptr()}
    arguments |= {"lse": x.data_ptr(), "log_prob": 0, "entropy": 0, "correct": 0, "dloss": 0, "dlogits": 0}
    arguments |= {"rows": 2, "cols": 4, "dtype": 0} | PLAIN
    C.cpu.cross_entropy_fwd(**arguments)
    with pytest.raises(ValueError, match=message):
        C.cpu.cross_entropy_fwd(**arguments | change)
