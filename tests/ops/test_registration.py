"""Every op as torch sees it: opcheck, torch.compile without a graph break, autocast, and shapes that change."""

from __future__ import annotations

import pytest
import torch

import lemur_fast as lf
from lemur_fast.ops import _products

CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
OPS = torch.ops.lemur_fast


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def operator_calls(backend):
    """Arguments for every differentiable operator, with and without its optional tensors."""
    x, residual, weight, gate, up = tensors((6, 8), (6, 8), (8,), (6, 8), (6, 8))
    q, k, v = tensors((12, 4, 16), (12, 2, 16), (12, 2, 16))
    cos, sin = torch.randn(12, 16), torch.randn(12, 16)
    logits, hidden, head, bias = tensors((6, 9), (6, 8), (9, 8), (9,))
    labels, rows = torch.tensor([0, 3, -100, 8, 1, -100]), torch.tensor([0, 3, 6]).int()
    options = (-100, 0.1, 0.01, 2.0)
    return {
        "rms_norm": [(x, weight, 1e-5, backend)],
        "add_rms_norm": [(x, residual, weight, 1e-5, backend)],
        "rotary": [(q, k, cos, sin, interleaved, backend) for interleaved in (False, True)],
        "swiglu": [(gate, up, backend)],
        "attention": [
            (q, k, v, CU, CU, True, 0, 0.0, 0.25, backend),
            (q, k, v, CU, CU, True, 3, 2.0, 0.25, backend),
        ],
        "cross_entropy": [(logits, labels, *options, stats, backend) for stats in (False, True)],
        "cross_entropy_sum": [(logits, labels, *options, both, both, backend) for both in (False, True)],
        "linear_cross_entropy": [
            (hidden, head, None, labels, None, None, *options, False, backend),
            (hidden, head, bias, labels, rows, 2, *options, True, backend),
        ],
        "linear_cross_entropy_sum": [
            (hidden, head, None, labels, None, None, None, *options, True, False, True, torch.float32, False, backend),
            (hidden, head, bias, labels, rows, torch.rand(6), 2, *options, *(True,) * 3, torch.float32, True, backend),
        ],
    }


@pytest.mark.parametrize("op", sorted(operator_calls("reference")))
def test_opcheck(backend, op):
    for arguments in operator_calls(backend)[op]:
        torch.library.opcheck(getattr(OPS, op).default, arguments)


@pytest.mark.parametrize("op", sorted(operator_calls("reference")))
@pytest.mark.parametrize("wants_grad", [False, True])
def test_forward_mode_is_refused(op, wants_grad):
    """torch would give a result without a tangent, which is a gradient of zero."""
    operator, (first, *rest) = getattr(OPS, op).default, operator_calls("reference")[op][0]
    rest = [x.detach() if isinstance(x, torch.Tensor) else x for x in rest]
    first = first.detach().requires_grad_(wants_grad)
    refused = pytest.raises(NotImplementedError, match=f"lemur_fast::{op}: forward-mode AD .* is not supported")
    with refused, torch.autograd.forward_ad.dual_level():
        operator(torch.autograd.forward_ad.make_dual(first, torch.ones_like(first)), *rest)
    with refused:
        torch.func.jvp(lambda x: operator(x, *rest), (first,), (torch.ones_like(first),))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype_of_dweight", [torch.bfloat16, torch.float32])
def test_opcheck_of_a_gradient_in_either_dtype(backend, monkeypatch, amx, dtype_of_dweight):
    monkeypatch.setattr(_products, "has_amx", lambda: amx)
    hidden, head = tensors((6, 8), (9, 8), dtype=torch.bfloat16)
    labels, options = torch.tensor([0, 3, -100, 8, 1, -100]), (-100, 0.1, 0.01, 2.0)
    for chunk_tokens in (None, 2):
        arguments = (hidden, head, None, labels, None, None, chunk_tokens, *options, True, False)
        arguments += (True, dtype_of_dweight, False, backend)
        torch.library.opcheck(OPS.linear_cross_entropy_sum.default, arguments)


def test_a_gradient_in_another_dtype_is_refused(backend):
    (hidden, head), labels = tensors((6, 8), (9, 8), dtype=torch.bfloat16), torch.zeros(6, dtype=torch.long)
    arguments = (hidden, head, None, labels, None, None, None, -100, 0.0, 0.0, 0.0, True, False)
    with pytest.raises(TypeError, match=r"want_weight: got torch.float16; takes torch.float32, torch.bfloat16, "):
        OPS.linear_cross_entropy_sum(*arguments, True, torch.float16, False, backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_for_any_number_of_chunks(backend, monkeypatch, reduction):
    """In bfloat16, whose dweight hangs on it; where only the data tell how many rows there are, too."""
    monkeypatch.setattr(_products, "float32_is_faster", lambda: False)

    def loss(hidden, head, labels):
        return lf.ops.linear_cross_entropy(hidden, head, labels, chunk_tokens=10, reduction=reduction).sum()

    def loss_of_some(hidden, head, labels):
        rows = (labels > 3).nonzero()[:, 0]
        return loss(hidden[rows], head, labels[rows])

    for function in (loss, loss_of_some):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for tokens in (8, 30, 9, 70, 10, 11):
            hidden, head = tensors((tokens, 8), (9, 8), dtype=torch.bfloat16)
            labels = torch.randint(0, 9, (tokens,))
            labels[0] = 8
            plain, traced = (run(hidden, head, labels) for run in (function, compiled))
            torch.testing.assert_close(plain, traced)
            torch.testing.assert_close(*(torch.autograd.grad(out, (hidden, head)) for out in (plain, traced)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_tokens_stays_one_trace(backend, monkeypatch, reduction):
    """Neither a chunk nor the rows of a product bind a size that was said to be dynamic."""
    monkeypatch.setattr(_products, "float32_is_faster", lambda: False)

    class Loss(torch.nn.Module):
        def forward(self, hidden, head, labels):
            return lf.ops.linear_cross_entropy(hidden, head, labels, chunk_tokens=64, reduction=reduction).sum()

    hidden, head = tensors((64, 8), (9, 8), dtype=torch.bfloat16)
    labels, tokens = torch.randint(0, 9, (64,)), torch.export.Dim("tokens", min=2, max=5000)
    sizes = ({0: tokens}, None, {0: tokens})
    program = torch.export.export(Loss(), (hidden, head, labels), dynamic_shapes=sizes, strict=False).module()
    torch._dynamo.reset()
    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(hidden, 0)
    torch._dynamo.mark_dynamic(labels, 0)
    for tokens in (64, 30, 100):
        if tokens != 64:
            (hidden,), labels = tensors((tokens, 8), dtype=torch.bfloat16), torch.randint(0, 9, (tokens,))
        (want,) = torch.autograd.grad(Loss()(hidden, head, labels), head)
        for run in (program, compiled):
            torch.testing.assert_close(torch.autograd.grad(run(hidden, head, labels), head)[0], want)


def model(x, residual, weight, qkv, cos, sin, cu, hidden, head, labels):
    """All six public functions, as a transformer layer and its loss use them."""
    y, h = lf.ops.rms_norm(x, weight, residual=residual)
    q, k = lf.ops.rotary(qkv[:, :4], qkv[:, 4:6], cos, sin)
    out, lse = lf.ops.attention(q, k, qkv[:, 6:], cu, return_lse=True)
    act = lf.ops.swiglu(y, h)
    loss, stats = lf.ops.linear_cross_entropy(hidden, head, labels, return_stats=True)
    plain = lf.ops.cross_entropy(hidden @ head.T, labels, z_loss=1e-3)
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # query in the tail
    return out.square().sum() + act.sum() + loss + plain + lse.sum(), stats.entropy.sum()


def model_inputs(tokens):
    cu = torch.tensor([0, 2, tokens - 1]).int()
    floats = tensors((tokens, 8), (tokens, 8), (8,), (tokens, 8, 16))
    tables = [torch.randn(tokens, 16) for _ in range(2)]
    return *floats, *tables, cu, *tensors((tokens, 8), (9, 8)), torch.randint(0, 9, (tokens,))


def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (7, 12, 13):  # the second size makes the shapes dynamic; the third must not compile anew
        arguments = model_inputs(tokens)
        wanted = [a for a in arguments if a.requires_grad]
        plain, compiled_out = model(*arguments), compiled(*arguments)
        torch.testing.assert_close(plain, compiled_out)
        grads = [torch.autograd.grad(out[0], wanted) for out in (plain, compiled_out)]
        torch.testing.assert_close(*grads)
        if tokens == 12:
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_compiles_with_inductor():
    torch._dynamo.reset()
    arguments = model_inputs(9)
    wanted = [a for a in arguments if a.requires_grad]
    plain, compiled = model(*arguments), torch.compile(model, fullgraph=True)(*arguments)
    torch.testing.assert_close(plain, compiled)
    torch.testing.assert_close(*(torch.autograd.grad(out[0], wanted) for out in (plain, compiled)))


# ---- autocast: what stock layers would return, with float32 weights and bfloat16 products ----------------------------


@pytest.fixture
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_norm_keeps_its_dtypes(backend, autocast):
    x, weight = torch.randn(4, 8), torch.randn(8)
    y, h = lf.ops.rms_norm(x.bfloat16(), weight, residual=x)
    assert y.dtype == h.dtype == torch.float32
    assert lf.ops.rms_norm(x, weight).dtype == torch.float32


def test_rotary_promotes(backend, autocast):
    q, table = torch.randn(4, 2, 8).bfloat16(), torch.randn(4, 8)
    assert lf.ops.rotary(q, q, table, table)[0].dtype == torch.float32


def test_products_run_in_the_autocast_dtype(backend, autocast):
    q, (gate,) = torch.randn(12, 2, 16), tensors((4, 8))
    assert lf.ops.attention(q, q, q, CU).dtype == torch.bfloat16
    assert lf.ops.swiglu(gate, gate).dtype == torch.bfloat16
    lf.ops.swiglu(gate, gate).sum().backward()
    assert gate.grad.dtype == torch.float32


def test_cross_entropy_of_bfloat16_logits_is_float32(backend, autocast):
    logits, labels = torch.randn(4, 8).bfloat16(), torch.tensor([1, 2, 3, -100])
    loss = lf.ops.cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), labels))


def test_linear_cross_entropy_under_autocast_equals_the_same_in_bfloat16(backend):
    hidden, head = tensors((6, 8), (9, 8))
    labels = torch.tensor([0, 3, -100, 8, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = lf.ops.linear_cross_entropy(hidden, head, labels)
    loss.backward()
    low = hidden.detach().bfloat16().requires_grad_()
    same = lf.ops.linear_cross_entropy(low, head.detach(), labels)
    same.backward()
    assert torch.equal(loss, same)
    assert head.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, low.grad.float())


def test_backward_inside_autocast_computes_the_same(backend):
    """Autocast that is still on in the backward must not narrow its float32 products."""
    q = torch.randn(12, 2, 16, requires_grad=True)
    with torch.autocast("cpu", enabled=False):
        out = lf.ops.attention(q, q, q, CU, softcap=2.0).square().sum()
    (want,) = torch.autograd.grad(out, q, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(out, q)
    assert torch.equal(want, got)


def test_linear_cross_entropy_under_autocast_of_another_dtype_than_the_weights():
    """As torch's own layers, which cast both."""
    hidden, head = tensors((6, 8), (9, 8))
    half = head.detach().half().requires_grad_()
    labels = torch.tensor([0, 3, -100, 8, 1, -100])
    with torch.autocast("cpu", torch.bfloat16):
        loss = lf.ops.linear_cross_entropy(hidden, half, labels)
        expected = lf.ops.linear_cross_entropy(hidden, half.bfloat16(), labels)
    loss.backward()
    assert torch.equal(loss, expected)
    assert half.grad.dtype == torch.float16
    assert half.grad.abs().sum() > 0
