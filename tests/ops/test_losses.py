"""cross_entropy and linear_cross_entropy: both against the formula in plain torch, in the same dtype and in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional

import lemur_fast as lf
from lemur_fast import _compiled
from lemur_fast.ops import _products
from tests.criterion import assert_as_good, compare, kept_by

LINEAR = sys.modules["lemur_fast.ops.linear_cross_entropy"]  # the name is the function's

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0},
    {"ignore_index": 3},
]


def formula(
    logits,
    labels,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    weights=None,
    reduction="mean",
    num_items=None,
):
    """Built on torch's own cross_entropy; logits are widened first, as every careful trainer does."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = softcap * torch.tanh(x / softcap) if softcap else x
    labels = labels.long()
    loss = functional.cross_entropy(
        x, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    trained = labels != ignore_index
    loss = loss + torch.where(trained, z_loss * torch.logsumexp(x, -1).square(), 0.0)
    loss = loss if weights is None else loss * weights.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    items = num_items if num_items is not None else (trained if weights is None else weights[trained]).sum()
    return loss.sum() / items


def linear_formula(hidden, weight, labels, bias=None, **options):
    return formula(functional.linear(hidden, weight, bias), labels, **options)


def logit_case(tokens=37, vocab=101, dtype=torch.float32, ignored=0.4, ignore_index=-100):
    labels = torch.randint(0, vocab, (tokens,))
    labels[torch.rand(tokens) < ignored] = ignore_index
    return {"logits": (2 * torch.randn(tokens, vocab)).to(dtype), "labels": labels}


def linear_case(tokens=37, vocab=101, width=24, dtype=torch.float32, bias=False, **rest):
    case = logit_case(tokens, vocab, dtype, **rest)
    case["hidden"], case["weight"] = torch.randn(tokens, width).to(dtype), (torch.randn(vocab, width) / 3).to(dtype)
    del case["logits"]
    return case | ({"bias": torch.randn(vocab).to(dtype)} if bias else {})


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy_matches_float64(backend, dtype, reduction, options):
    inputs = logit_case(dtype=dtype, ignore_index=options.get("ignore_index", -100))
    options = options | {"reduction": reduction}
    compare(lambda **t: lf.ops.cross_entropy(**t, **options), lambda **t: formula(**t, **options), inputs, ["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_cross_entropy_matches_float64(backend, dtype, reduction, options):
    inputs = linear_case(dtype=dtype, bias=True, ignore_index=options.get("ignore_index", -100))
    options = options | {"reduction": reduction}
    compare(
        lambda **t: lf.ops.linear_cross_entropy(**t, **options, chunk_tokens=10),
        lambda **t: linear_formula(**t, **options),
        inputs,
        ["hidden", "weight", "bias"],
    )


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 7), (5, 2), (300, 33)])
def test_odd_sizes(backend, tokens, vocab):
    compare(lf.ops.cross_entropy, formula, logit_case(tokens, vocab, ignored=0.0), ["logits"])
    for width, dtype in ((5, torch.float32), (0, torch.float32), (0, torch.bfloat16)):
        case = linear_case(tokens, vocab, width, dtype=dtype, ignored=0.0)
        for chunk_tokens in (None, 2):
            compare(
                lambda **t: lf.ops.linear_cross_entropy(**t, chunk_tokens=chunk_tokens),  # noqa: B023
                linear_formula,
                case,
                ["hidden", "weight"],
            )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_their_gradient(backend, reduction):
    weights = torch.rand(37) + 0.1
    for ours, plain, inputs, grads in (
        (lf.ops.cross_entropy, formula, logit_case(), ["logits"]),
        (lf.ops.linear_cross_entropy, linear_formula, linear_case(), ["hidden", "weight"]),
    ):
        inputs = inputs | {"weights": weights}
        for wanted in (grads, [*grads, "weights"]):
            compare(
                lambda f=ours, **t: f(**t, reduction=reduction),
                lambda f=plain, **t: f(**t, reduction=reduction),
                inputs,
                wanted,
            )


def test_num_items_is_what_mean_divides_by(backend):
    for items in (50, 12.5, torch.tensor(4097), torch.tensor(50.0)):
        compare(
            lambda **t: lf.ops.cross_entropy(**t, num_items=items),  # noqa: B023
            lambda **t: formula(**t, num_items=items),  # noqa: B023
            logit_case(),
            ["logits"],
        )
        compare(
            lambda **t: lf.ops.linear_cross_entropy(**t, num_items=items),  # noqa: B023
            lambda **t: linear_formula(**t, num_items=items),  # noqa: B023
            linear_case(),
            ["hidden", "weight"],
        )


def test_micro_batches_sum_to_the_batch(backend):
    """8 micro-batches with a common num_items give the gradients of one: the mean of means would not."""
    case = linear_case(tokens=64, ignored=0.5)
    items = (case["labels"] != -100).sum()
    gradients = []
    for parts in (1, 8):
        weight = case["weight"].clone().requires_grad_()
        for hidden, labels in zip(case["hidden"].chunk(parts), case["labels"].chunk(parts), strict=True):
            lf.ops.linear_cross_entropy(hidden, weight, labels, num_items=items).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 37, 1000, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("amx", [False, True])
def test_chunk_size_does_not_matter(backend, monkeypatch, chunk_tokens, reduction, amx):
    """Nor how dweight lies in memory, which hangs on AMX; it is of more rows than are added at a time."""
    monkeypatch.setattr(_products, "has_amx", lambda: amx)
    monkeypatch.setattr(LINEAR, "_PRODUCT_ROWS", 40)
    for ignored in (0.0, 0.4):
        compare(
            lambda **t: lf.ops.linear_cross_entropy(**t, chunk_tokens=chunk_tokens, reduction=reduction),
            lambda **t: linear_formula(**t, reduction=reduction),
            linear_case(dtype=torch.bfloat16, ignored=ignored),
            ["hidden", "weight"],
        )


@pytest.mark.skipif(_compiled.missing is not None, reason="the compiled part is not built")
def test_the_gradient_of_one_chunk_is_kept_in_its_dtype(monkeypatch):
    """On a CPU that multiplies bfloat16 as such: there a product is rounded in any case."""
    monkeypatch.setattr(_products, "float32_is_faster", lambda: False)
    case = linear_case(dtype=torch.bfloat16)
    hidden, weight = (case[name].requires_grad_() for name in ("hidden", "weight"))
    for chunk_tokens, size in ((37, 2), (36, 4)):
        _, kept = kept_by(
            lambda h, w: lf.ops.linear_cross_entropy(h, w, case["labels"], chunk_tokens=chunk_tokens),  # noqa: B023
            hidden,
            weight,
        )
        items = 4
        assert kept == 2 * hidden.numel() + size * weight.numel() + items


def test_gradcheck_in_float64():
    case = {name: t.double() if t.is_floating_point() else t for name, t in linear_case(9, 7, 4, bias=True).items()}
    floats = [case[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}, {"reduction": "none"}):
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: lf.ops.linear_cross_entropy(h, w, case["labels"], bias=b, chunk_tokens=4, **o),
            floats,
        )


def test_weight_gradient_is_summed_in_float32(backend):
    """300 bfloat16 chunks: a sum kept in bfloat16 would lose most of them."""
    case = linear_case(tokens=300, vocab=17, width=8, dtype=torch.bfloat16, ignored=0.0)
    compare(
        lambda **t: lf.ops.linear_cross_entropy(**t, chunk_tokens=1, reduction="sum"),
        lambda **t: linear_formula(**t, reduction="sum"),
        case,
        ["weight"],
    )


def test_wider_weight_gets_a_float32_gradient(backend):
    case = linear_case(dtype=torch.bfloat16)
    hidden, weight = case["hidden"], case["weight"].float().requires_grad_()
    lf.ops.linear_cross_entropy(hidden, weight, case["labels"]).backward()
    exact_weight = weight.detach().double().requires_grad_()
    linear_formula(hidden.double(), exact_weight, case["labels"]).backward()
    stock_weight = weight.detach().requires_grad_()
    linear_formula(hidden, stock_weight.bfloat16(), case["labels"]).backward()
    assert weight.grad.dtype == torch.float32
    # the products are bfloat16's; no more is claimed than for them
    ours, stock = weight.grad.bfloat16(), stock_weight.grad.bfloat16()
    assert_as_good("gradient of weight", ours, stock, exact_weight.grad)


def test_no_logits_of_the_whole_batch_are_held():
    """2,048 tokens of 4,000 words, forward and backward: the largest tensor is a chunk's, or the weight's gradient."""
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(4000, 8, requires_grad=True)
    labels = torch.randint(0, 4000, (2048,))
    for reduction in ("sum", "none"):
        with torch.profiler.profile(profile_memory=True) as profile:
            lf.ops.linear_cross_entropy(hidden, weight, labels, chunk_tokens=64, reduction=reduction).sum().backward()
        largest = max(event.cpu_memory_usage for event in profile.events() if "lemur_fast" not in event.name)
        assert largest < 4 * 64 * 4000 * 4


def test_untrained_rows_are_not_projected(monkeypatch):
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(1000, 8)
    labels = torch.full((2048,), -100)
    labels[::256] = 3
    seen = []
    token_loss = LINEAR.compiled_token_loss
    monkeypatch.setattr(
        LINEAR, "compiled_token_loss", lambda x, *a, **k: (seen.append(len(x)), token_loss(x, *a, **k))[1]
    )
    lf.ops.linear_cross_entropy(hidden, weight, labels).backward()
    assert seen == [8]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_restrict_the_loss(backend):
    case = linear_case(ignored=0.3)
    rows = torch.tensor([30, 2, 5, 36, 0, 11])
    kept = torch.full_like(case["labels"], -100)
    kept[rows] = case["labels"][rows]
    padded = torch.cat((rows, torch.tensor([37, 37, -1, 1 << 30]))).int()
    for options in ({}, {"reduction": "none"}, {"return_stats": True}):
        results = []
        for labels, given in ((kept, None), (case["labels"], rows), (case["labels"], padded)):
            hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
            out = lf.ops.linear_cross_entropy(hidden, weight, labels, rows=given, **options)
            loss = out[0] if isinstance(out, tuple) else out
            loss.sum().backward()
            results.append((loss, hidden.grad, weight.grad, *(out[1] if isinstance(out, tuple) else ())))
        for other in results[1:]:
            # On a GPU, rows that are left out change the shapes of the products, and with them their rounding.
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend == "triton" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(other, results[0], **tolerance)


def test_a_row_that_is_named_twice_counts_once(backend):
    case = linear_case()
    results = []
    for rows in (torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1, 3, 0])):
        hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
        loss = lf.ops.linear_cross_entropy(hidden, weight, case["labels"], rows=rows, reduction="sum")
        loss.backward()
        results.append((loss, hidden.grad, weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_rows_of_no_tokens(backend):
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    rows = torch.tensor([-1, 0])
    loss = lf.ops.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), rows=rows)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_trained_gives_zero(backend, reduction, tokens):
    labels = torch.full((tokens,), -100)
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logits = torch.randn(tokens, 9, requires_grad=True)
    for num_items in (None, 0, torch.tensor(0)) if reduction == "mean" else (None,):
        loss = lf.ops.cross_entropy(logits, labels, reduction=reduction, num_items=num_items).sum()
        fused = lf.ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction, num_items=num_items).sum()
        (loss + fused).backward()
        assert loss.item() == fused.item() == 0.0
        for tensor in (hidden, weight, logits):
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_nan_in_an_ignored_row_stays_there():
    """As padding may hold anything. (The reference multiplies all rows in one product, where 0 * NaN is NaN.)"""
    case = linear_case(ignored=0.0)
    case["labels"][4] = -100
    case["hidden"][4] = torch.nan
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    lf.ops.linear_cross_entropy(hidden, weight, case["labels"]).backward()
    assert torch.isfinite(weight.grad).all()
    assert torch.equal(hidden.grad[4], torch.zeros(24))


def test_masked_logits(backend):
    """-inf logits, as constrained decoding and padded vocabularies have them; also at the label itself."""
    logits = torch.randn(3, 6)
    logits[0, 2] = logits[1, 0] = logits[2, 1] = -torch.inf
    labels = torch.tensor([2, 3, 0])
    loss, stats = lf.ops.cross_entropy(logits.requires_grad_(), labels, reduction="none", return_stats=True)
    assert torch.equal(loss.isinf(), torch.tensor([True, False, False]))
    torch.testing.assert_close(stats.lse, torch.logsumexp(logits, -1))
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=logits.detach()).entropy())
    loss[1:].sum().backward()
    assert torch.isfinite(logits.grad[1:]).all()


@pytest.mark.parametrize("low", [-1e5, torch.finfo(torch.float32).min])
def test_lse_beside_a_very_low_label(backend, low):
    """Logits masked by a large negative number, the label's among them: lse is that of the others."""
    logits = torch.randn(2, 16)
    logits[:, 5] = low
    _, stats = lf.ops.cross_entropy(logits, torch.tensor([5, 5]), return_stats=True)
    torch.testing.assert_close(stats.lse, torch.logsumexp(logits.double(), -1).float())


def test_losses_over_no_items_are_infinite(backend):
    case = linear_case()
    assert lf.ops.linear_cross_entropy(**case, num_items=0).isinf()
    assert lf.ops.linear_cross_entropy(**case, num_items=torch.tensor(0)).isinf()


def test_large_logits_do_not_overflow(backend):
    case = logit_case()
    case["logits"] = 1e4 * case["logits"]
    compare(lf.ops.cross_entropy, formula, case, ["logits"])


def test_labels_outside_the_vocabulary_raise_on_the_cpu(backend):
    case = linear_case()
    for wrong in (101, -1):
        labels = case["labels"].clone()
        labels[5] = wrong
        with pytest.raises(
            ValueError, match=f"labels: got {wrong} at position 5; takes 0 to 100, or ignore_index -100"
        ):
            lf.ops.cross_entropy(torch.randn(37, 101), labels)
        with pytest.raises(ValueError, match=f"labels: got {wrong} at position 5"):
            lf.ops.linear_cross_entropy(case["hidden"], case["weight"], labels)


def test_labels_outside_the_vocabulary_are_nan_where_looking_costs_a_sync():
    from lemur_fast.ops._loss import LossOptions, token_loss_backward_reference, token_loss_reference

    logits, labels = torch.randn(3, 5), torch.tensor([1, 9, -100])
    losses = token_loss_reference(logits, labels, options := LossOptions(-100, 0.0, 0.0, 0.0), False)
    assert torch.equal(losses.loss.isnan(), torch.tensor([False, True, False]))
    grad = token_loss_backward_reference(torch.ones(3), logits, labels, losses.lse, options)
    assert torch.equal(grad.isnan().all(1), torch.tensor([False, True, False]))


# ---- stats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_stats(backend, softcap):
    inputs = linear_case()
    hidden, weight, labels = inputs["hidden"].requires_grad_(), inputs["weight"], inputs["labels"]
    logits = hidden.double() @ weight.double().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    distribution = torch.distributions.Categorical(logits=logits)
    trained = labels != -100
    want = {
        "lse": torch.logsumexp(logits, -1),
        "log_prob": distribution.log_prob(labels.clamp(0)),
        "entropy": distribution.entropy(),
    }
    for function, tensors in (
        (lf.ops.cross_entropy, [(hidden @ weight.T)]),
        (lf.ops.linear_cross_entropy, [hidden, weight]),
    ):
        loss, stats = function(*tensors, labels, softcap=softcap, return_stats=True)
        assert torch.equal(loss, function(*tensors, labels, softcap=softcap))
        for name, exact in want.items():
            got = getattr(stats, name)
            assert got.dtype == torch.float32
            assert not got.requires_grad
            torch.testing.assert_close(got, torch.where(trained, exact, 0.0).float(), msg=name)
        assert torch.equal(stats.correct, trained & (logits.argmax(-1) == labels))


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_second_backward_scaled_gradient_and_frozen_weight(backend):
    for reduction in ("sum", "none"):
        case = linear_case()
        hidden, weight = case["hidden"].requires_grad_(), case["weight"]
        loss = lf.ops.linear_cross_entropy(hidden, weight, case["labels"], reduction=reduction).sum()
        loss.backward(retain_graph=True)
        first, hidden.grad = hidden.grad, None
        (4 * loss).backward()
        torch.testing.assert_close(hidden.grad, 4 * first, rtol=0, atol=0)
        assert weight.grad is None


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_double_backward_raises(backend, reduction):
    case = linear_case()
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    loss = lf.ops.linear_cross_entropy(hidden, weight, case["labels"], reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
    logits = torch.randn(37, 101, requires_grad=True)
    loss = lf.ops.cross_entropy(logits, case["labels"], reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


class _Nothing(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_gradient_comes_back(backend, reduction):
    """Torch hands the backward a None there, as zeros for the results that have no gradient would take memory."""
    logits, labels = torch.randn(37, 101, requires_grad=True), torch.randint(0, 101, (37,))
    weight = torch.randn(101, 101, requires_grad=True)
    _Nothing.apply(lf.ops.cross_entropy(logits, labels, reduction=reduction)).sum().backward()
    _Nothing.apply(lf.ops.linear_cross_entropy(logits, weight, labels, reduction=reduction)).sum().backward()
    _Nothing.apply(lf.ops.rms_norm(logits, weight[0], 1e-5)).sum().backward()
    assert logits.grad is None
    assert weight.grad is None


def test_the_backward_makes_no_zeros_of_the_weights_size():
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    loss = lf.ops.linear_cross_entropy(hidden, weight, torch.randint(0, 300, (40,)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss.backward()
    assert not [event for event in profile.events() if event.name == "aten::zero_" and [300, 16] in event.input_shapes]


def test_inputs_are_not_overwritten(backend):
    case = linear_case() | {"logits": torch.randn(37, 101)}
    before = {name: t.clone() for name, t in case.items()}
    hidden, weight, logits = (case[name].requires_grad_() for name in ("hidden", "weight", "logits"))
    loss = lf.ops.linear_cross_entropy(hidden, weight, case["labels"]) + lf.ops.cross_entropy(logits, case["labels"])
    loss.backward()
    assert all(torch.equal(case[name], before[name]) for name in case)


def test_expanded_and_strided_inputs(backend):
    labels = torch.tensor([1, 2, 0, 4])
    for logits in (torch.randn(1, 5).expand(4, 5), torch.randn(5, 4).T, torch.randn(4, 10)[:, ::2]):
        compare(lf.ops.cross_entropy, formula, {"logits": logits, "labels": labels}, ["logits"])
        torch.testing.assert_close(lf.ops.cross_entropy(logits, labels), formula(logits, labels))
    hidden, weight = torch.randn(3, 4).T, torch.randn(3, 5).T
    torch.testing.assert_close(
        lf.ops.linear_cross_entropy(hidden, weight, labels), linear_formula(hidden, weight, labels)
    )


def test_int32_labels(backend):
    case = logit_case()
    assert torch.equal(lf.ops.cross_entropy(**case), lf.ops.cross_entropy(case["logits"], case["labels"].int()))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(37, 24).long()}, TypeError, "hidden: got dtype torch.int64"),
        ({"weight": torch.zeros(101, 23)}, ValueError, r"weight: got shape \[101, 23\]"),
        ({"weight": torch.zeros(101, 24).half()}, ValueError, "weight: got dtype torch.float16"),
        ({"bias": torch.zeros(100)}, ValueError, r"bias: got shape \[100\]"),
        ({"labels": torch.zeros(36).long()}, ValueError, r"labels: got shape \[36\]"),
        ({"labels": torch.zeros(37)}, TypeError, "labels: got dtype torch.float32"),
        ({"weights": torch.zeros(36)}, ValueError, r"weights: got shape \[36\]"),
        ({"rows": torch.zeros(3)}, TypeError, "rows: got dtype torch.float32"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: got 0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss: got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0"),
        ({"chunk_tokens": 2.5}, TypeError, "chunk_tokens: got float; takes an int"),
        ({"ignore_index": -100.0}, TypeError, "ignore_index: got float"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing: got str"),
        ({"softcap": float("nan")}, ValueError, "softcap: got nan"),
        ({"num_items": "5"}, TypeError, "num_items: got str"),
        ({"num_items": -5}, ValueError, "num_items: got -5"),
        ({"num_items": torch.tensor([3, 4])}, ValueError, r"num_items: got shape \[2\]; takes one number"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items: got a value with reduction='sum'"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        lf.ops.linear_cross_entropy(**(linear_case() | change))
