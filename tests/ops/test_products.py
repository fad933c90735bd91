"""Products of bfloat16 in float32, against float64 and beside torch's own."""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace

import pytest
import torch

import lemur_fast as lf
from lemur_fast import _compiled
from lemur_fast.ops import _products
from lemur_fast.ops.rms_norm import Normed
from tests.criterion import compare, kept_by


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    """On CPUs that are faster at bfloat16, too; and with parts so small that there are several."""
    monkeypatch.setattr(_products, "float32_is_faster", lambda: True)
    monkeypatch.setattr(_products, "_ROWS", 48)
    monkeypatch.setattr(_products, "_WEIGHT_ELEMENTS", 500)


def bfloat16(*shape):
    return torch.randn(shape).bfloat16()


SHAPES = [(64, 16, 8), (65, 7, 3), (97, 33, 41), (200, 1, 130), (128, 600, 5)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear(rows, inputs, outputs, biased):
    given = {"x": bfloat16(rows, inputs), "weight": bfloat16(outputs, inputs)}
    if biased:
        given["bias"] = bfloat16(outputs)
    compare(_products.linear, torch.nn.functional.linear, given, grads=tuple(given))


def test_sums_are_rounded_once():
    """256, and 4,096 times 2^-9: added one by one, or part by part, to a bfloat16, the small ones would be lost."""
    row = torch.cat([torch.full((1,), 256.0), torch.full((4096,), 2.0**-9)]).bfloat16()
    ones = torch.ones(4097, dtype=torch.bfloat16)
    y = _products.linear(row.expand(64, -1), ones[None])
    assert y.unique().tolist() == [264]
    x = torch.zeros(64, 1, dtype=torch.bfloat16, requires_grad=True)
    (dx,) = torch.autograd.grad(_products.linear(x, row[:, None]), x, ones.expand(64, -1))  # nine parts of the weight
    assert dx.unique().tolist() == [264]
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (dweight,) = torch.autograd.grad(_products.linear(row[:, None], weight), weight, ones[:, None])  # 86 parts of rows
    assert dweight.item() == 264


def test_leading_dimensions_and_strides():
    """Every other element of a transposed x, a transposed weight, and a gradient of one number."""
    x = bfloat16(18, 4, 20).transpose(0, 1)[..., ::2].requires_grad_()
    weight = bfloat16(10, 6).T.requires_grad_()
    y = _products.linear(x, weight)
    assert y.shape == (4, 18, 6)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    torch.testing.assert_close(dx.double(), weight.double().sum(0).expand(x.shape), rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(dweight.double(), x.double().sum((0, 1)).expand(6, 10), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_alone_is_the_same(wanted):
    given = bfloat16(70, 8), bfloat16(90, 8), bfloat16(90)
    dy = bfloat16(70, 90)

    def found(*wanted):
        tensors = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
        _products.linear(*tensors).backward(dy)
        return [x.grad for x in tensors]

    for alone, together, want in zip(found(*wanted), found(True, True, True), wanted, strict=True):
        assert torch.equal(alone, together) if want else alone is None


def test_gradients_are_added_in_float32():
    x, dy = bfloat16(100, 12), bfloat16(100, 70)
    total = torch.full((12, 70), torch.nan).T  # as the loss lays it out; what lies there is ignored at first
    _products.gradients([_products.Layer(dy[:50], None, total)], x[:50], None)
    _products.gradients([_products.Layer(dy[50:], None, total)], x[50:], None, add=True)
    torch.testing.assert_close(total.double(), dy.double().T @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", ""])
def test_no_more_is_kept_for_the_backward_than_torch_keeps(frozen):
    given = {"x": bfloat16(70, 8), "weight": bfloat16(9, 8), "bias": bfloat16(9)}
    for name, tensor in given.items():
        tensor.requires_grad_(name != frozen)

    def kept(layer):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(tuple(t.shape)), t)[1], lambda t: t):
            layer(**given)
        return sorted(tuple(sorted(shape)) for shape in found)  # torch keeps the weight turned

    torch_keeps = kept(lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias))
    assert kept(_products.linear) == torch_keeps


def test_memory_of_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(_products._Wide, "_kept", threading.local())
    with torch.inference_mode():
        _products.linear(bfloat16(70, 8), bfloat16(9, 8))
    _products.linear(bfloat16(70, 8).requires_grad_(), bfloat16(9, 8).requires_grad_()).sum().backward()


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 0), (0, 5)])
def test_layers_of_size_zero(inputs, outputs):
    x, weight = bfloat16(70, inputs), bfloat16(outputs, inputs)
    assert torch.equal(_products.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert _products.linear(x, weight[0] if outputs else torch.ones(inputs).bfloat16()).shape == (70,)


def test_a_bias_of_one_is_torch_s():
    x, weight, bias = bfloat16(70, 8), bfloat16(90, 8), bfloat16(1)
    torch.testing.assert_close(_products.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("chunk_tokens", [None, 90])
@pytest.mark.parametrize("biased", [False, True])
def test_the_linear_loss(chunk_tokens, biased):
    labels = torch.randint(0, 90, (200,))
    labels[::7] = -100
    given = {"hidden": bfloat16(200, 24), "weight": bfloat16(90, 24)}
    if biased:
        given["bias"] = bfloat16(90)

    def stock(hidden, weight, bias=None):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, bias).float(), labels)

    def exact(hidden, weight, bias=None):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), labels)

    def ours(hidden, weight, bias=None):
        return lf.ops.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens)

    served = []
    project = _products.project
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_products, "project", lambda *a, **k: (served.append(1), project(*a, **k))[1])
        with lf.use_backend("cpu"):
            compare(ours, stock, given, grads=tuple(given), exact=exact)
    assert served


def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in (bfloat16(70, 8), bfloat16(90, 8), bfloat16(90)))
    for arguments in ((x, weight, None), (x, weight, bias), (x.detach().view(7, 10, 8), weight, bias)):
        torch.library.opcheck(torch.ops.lemur_fast.linear.default, arguments)


def test_compiles_without_a_graph_break():
    x, weight = bfloat16(70, 8), bfloat16(90, 8).requires_grad_()
    compiled = torch.compile(_products.linear, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(_products.linear(x, weight).sum(), weight)
    (found,) = torch.autograd.grad(compiled(x, weight).sum(), weight)
    assert torch.equal(found, expected)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_only_the_data_tell():
    weight = bfloat16(90, 8)
    compiled = torch.compile(lambda x: _products.linear(x[x[:, 0] > 0], weight), fullgraph=True, backend="aot_eager")
    x = bfloat16(200, 8)
    torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x[x[:, 0] > 0], weight))


def test_exports_with_any_number_of_rows():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return _products.linear(x, torch.ones(9, 8, dtype=torch.bfloat16))

    rows = torch.export.Dim("rows", min=64, max=1000)
    program = torch.export.export(Layer(), (bfloat16(100, 8),), dynamic_shapes=({0: rows},), strict=False)
    x = bfloat16(300, 8)
    torch.testing.assert_close(program.module()(x), Layer()(x))


def test_a_second_derivative_is_refused():
    x, weight = bfloat16(70, 8).requires_grad_(), bfloat16(90, 8)
    (gradient,) = torch.autograd.grad(_products.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_bwd: double backward is not supported"):
        gradient.sum().backward()


def test_threads_do_not_share_memory():
    from concurrent.futures import ThreadPoolExecutor

    weight = bfloat16(90, 8)
    inputs = [bfloat16(100, 8) for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda x: [_products.linear(x, weight) for _ in range(50)], inputs))
    for x, found in zip(inputs, results, strict=True):
        expected = _products.linear(x, weight)
        assert all(torch.equal(y, expected) for y in found)


def test_what_is_left_to_torch(monkeypatch):
    x, weight = bfloat16(64, 8), bfloat16(9, 8)
    assert _products.serves(x, weight)
    assert not _products.serves(x[:63], weight), "few rows"
    assert not _products.serves(x.float(), weight.float())
    assert not _products.serves(x, weight.float())
    assert not _products.serves(x.half(), weight.half())
    assert not _products.serves(x.to("meta"), weight.to("meta"))
    with lf.use_backend("reference"):
        assert not _products.serves(x, weight)
    with lf.use_backend("triton", "cpu"):
        assert _products.serves(x, weight)
    monkeypatch.setattr(_products, "float32_is_faster", lambda: False)
    assert not _products.serves(x, weight)


@pytest.mark.parametrize(
    ("features", "full_rate", "machine", "faster"),
    [
        ("avx2 fma f16c", False, "x86_64", True),
        ("avx2 avx512f", False, "AMD64", True),
        ("avx2 avx512f avx512_bf16", True, "x86_64", False),  # Cooper Lake, Zen 4
        ("avx2 avx512f avx512_bf16 avx512_fp16", False, "x86_64", True),  # Sapphire Rapids without AMX
        ("avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile", False, "x86_64", False),
        ("neon", False, "aarch64", False),
    ],
)
def test_where_float32_is_faster(monkeypatch, features, full_rate, machine, faster):
    monkeypatch.undo()
    monkeypatch.setattr(_products.platform, "machine", lambda: machine)
    monkeypatch.setattr(_compiled, "missing", None)
    cpu = SimpleNamespace(features=features.split, bfloat16_at_full_rate=lambda: full_rate)
    monkeypatch.setattr(_compiled, "C", SimpleNamespace(cpu=cpu))
    _products.float32_is_faster.cache_clear()
    try:
        assert _products.float32_is_faster() is faster
    finally:
        _products.float32_is_faster.cache_clear()


# ---- layers of one input, and dweight of a transposed operand --------------------------------------------------------


@pytest.fixture
def in_bfloat16(monkeypatch):
    """Where torch's products are not replaced."""
    monkeypatch.setattr(_products, "float32_is_faster", lambda: False)


@pytest.fixture
def transposing(monkeypatch, in_bfloat16):
    """dweight of every size takes a transposed operand, as large ones do with AMX; counts them."""
    if _compiled.missing is not None:
        pytest.skip(_compiled.missing)
    count = []
    original = _products._transposed
    monkeypatch.setattr(_products, "has_amx", lambda: True)
    monkeypatch.setattr(_products, "_FEWEST_TRANSPOSED", (1, 1))
    monkeypatch.setattr(_products, "_transposed_op", lambda x: (count.append(tuple(x.shape)), original(x))[1])
    return count


def stock_linears(x, *weights):
    return tuple(torch.nn.functional.linear(x, weight) for weight in weights)


def ours_of(x, *weights):
    return _products.linears(x, weights)


LAYERS = [(64, 16, (8, 8, 8)), (65, 7, (3, 12)), (97, 33, (41,)), (3, 40, (130, 9, 40))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LAYERS)
def test_layers_of_one_input(rows, inputs, outputs, dtype, in_bfloat16):
    given = {"x": torch.randn(rows, inputs).to(dtype)}
    given |= {f"w{i}": torch.randn(n, inputs).to(dtype) for i, n in enumerate(outputs)}

    def summed(function):  # of every output another multiple, so that they cannot be confused
        return lambda x, **w: sum((i + 1) * y.sum(-1) for i, y in enumerate(function(x, *w.values())))

    compare(summed(ours_of), summed(stock_linears), given, grads=tuple(given))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LAYERS)
def test_dweight_of_a_transposed_operand(rows, inputs, outputs, transposing):
    x, dys = bfloat16(rows, inputs), [bfloat16(rows, n) for n in outputs]
    for dy, found in zip(dys, _products.weight_gradients(dys, x, compiled=True), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), dy.double().T @ x.double(), rtol=2**-8, atol=1e-4)
    wide = [n for n in outputs if n > inputs]
    assert transposing.count((rows, inputs)) == (1 if wide else 0) + outputs.count(inputs), "x is transposed once"
    assert len(transposing) == len(outputs) - len(wide) + (1 + len(wide) if wide else 0)


def test_dweight_is_torch_s_without_amx_or_the_cpu_kernels(transposing, monkeypatch):
    x, dy = bfloat16(70, 8), bfloat16(70, 9)
    _products.weight_gradients([dy], x, compiled=False)
    _products.weight_gradients([dy.float()], x.float(), compiled=True)
    monkeypatch.setattr(_products, "has_amx", lambda: False)
    assert _products.weight_gradients([None], x, compiled=True) == [None]
    assert torch.equal(_products.weight_gradients([dy], x, compiled=True)[0], dy.T @ x)
    assert transposing == []


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_layers_gradient_alone_is_the_same(wanted, in_bfloat16):
    given = bfloat16(2, 35, 8), bfloat16(90, 8), bfloat16(9, 8)

    def found(*wanted):
        tensors = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
            first, second = ours_of(*tensors)
        (first.sum() + second.square().sum()).backward()
        return [x.grad for x in tensors], kept

    (alone, kept), (together, _) = found(*wanted), found(True, True, True)
    for a, b, want in zip(alone, together, wanted, strict=True):
        assert torch.equal(a, b) if want else a is None
    assert kept == ([(90, 8), (9, 8)] if wanted[0] else [(2, 35, 8)]), "no more than the gradient needs"


def test_layers_of_one_input_under_autocast_are_torch_s(in_bfloat16):
    x, weights = torch.randn(70, 8).requires_grad_(), [torch.randn(n, 8).requires_grad_() for n in (9, 5)]

    def gradients(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = function(x, *weights)
        assert {y.dtype for y in outputs} == {torch.bfloat16}
        return torch.autograd.grad(sum(y.float().sum() for y in outputs), (x, *weights))

    for a, b in zip(gradients(ours_of), gradients(stock_linears), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["in_bfloat16", "transposing"])
def test_layers_of_one_input_compile(where, request):
    request.getfixturevalue("in_bfloat16")
    if where == "transposing":
        if _compiled.missing is not None:
            pytest.skip(_compiled.missing)
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.setattr(_products, "has_amx", lambda: True)
        monkeypatch.setattr(_products, "_FEWEST_TRANSPOSED", (1, 1))
    given = [bfloat16(70, 8).requires_grad_(), bfloat16(9, 8).requires_grad_(), bfloat16(5, 8).requires_grad_()]
    compiled = torch.compile(ours_of, fullgraph=True, backend="aot_eager")

    def gradients(function):
        return torch.autograd.grad(sum(y.sum() for y in function(*given)), given)

    for a, b in zip(gradients(compiled), gradients(ours_of), strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_of_layers_of_one_input_is_right(in_bfloat16):
    given = [torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def second(function):
        y = function(*given)
        (dx,) = torch.autograd.grad(y[0].sum() + y[1].square().sum(), given[0], create_graph=True)
        return torch.autograd.grad(y[0].sum() + dx.square().sum(), given)

    for a, b in zip(second(ours_of), second(stock_linears), strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_of_a_transposed_operand_is_refused(transposing, monkeypatch):
    monkeypatch.undo()
    dy = bfloat16(300, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="transposed: double backward is not supported"):
        torch.ops.lemur_fast.transposed(dy).sum().backward()


def test_backward_inside_autocast_alone(in_bfloat16):
    given = [torch.randn(n, 8).requires_grad_() for n in (70, 9, 5)]

    def gradients(function, inside):
        loss = sum(y.square().sum() for y in function(*given))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, given)

    for a, b in zip(gradients(ours_of, True), gradients(stock_linears, False), strict=True):
        torch.testing.assert_close(a, b)


# ---- layers of one input, in float32 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "inputs", "outputs"), LAYERS)
def test_layers_of_one_input_in_float32(rows, inputs, outputs):
    given = {"x": bfloat16(rows, inputs)} | {f"w{i}": bfloat16(n, inputs) for i, n in enumerate(outputs)}
    served = []
    with pytest.MonkeyPatch.context() as patch:
        original = _products._linears_bwd_op
        patch.setattr(_products, "_linears_bwd_op", lambda *a: (served.append(1), original(*a))[1])

        def summed(function):
            return lambda x, **w: sum((i + 1) * y.sum(-1) for i, y in enumerate(function(x, *w.values())))

        compare(summed(ours_of), summed(stock_linears), given, grads=tuple(given))
    assert bool(served) == (rows >= 64)


def test_the_inputs_gradient_is_rounded_once_over_all_layers():
    """256 from one layer and 2^-9 from each of 64 columns of four others: a sum in bfloat16 would stay at 256."""
    x = torch.zeros(64, 1, dtype=torch.bfloat16, requires_grad=True)
    large, small = torch.full((1, 1), 256.0).bfloat16(), torch.full((1024, 1), 2.0**-9).bfloat16()
    outputs = _products.linears(x, [large, small, small, small, small])
    (dx,) = torch.autograd.grad(sum(y.sum(-1) for y in outputs).sum(), x)
    assert dx.unique().tolist() == [264]


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_layers_gradient_alone_is_the_same_in_float32(wanted):
    given = bfloat16(2, 35, 8), bfloat16(90, 8), bfloat16(9, 8)

    def found(*wanted):
        tensors = [x.detach().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
        first, second = ours_of(*tensors)
        (first.sum() + second.square().sum()).backward()
        return [x.grad for x in tensors]

    for alone, together, want in zip(found(*wanted), found(True, True, True), wanted, strict=True):
        assert torch.equal(alone, together) if want else alone is None


def test_linears_bwd_is_an_operator():
    dys, x, weights = [bfloat16(70, 9), bfloat16(70, 5)], bfloat16(70, 8), [bfloat16(9, 8), bfloat16(5, 8)]
    for arguments in ((dys, x, weights, [True, False]), (dys, None, weights, [False, False]), (dys, x, [], [True] * 2)):
        torch.library.opcheck(torch.ops.lemur_fast.linears_bwd.default, arguments)
        with torch.autocast("cpu", dtype=torch.float16):
            dx, _ = torch.ops.lemur_fast.linears_bwd(*arguments)
        assert dx.dtype == torch.bfloat16


# ---- an input that a norm made ---------------------------------------------------------------------------------------


def of_norm(h, norm_weight, *weights, again):
    """Layers behind a norm, whose result is made again or kept."""
    x = lf.ops.rms_norm(h, norm_weight)
    return _products.linears(x, weights, Normed(h, norm_weight, 1e-5) if again else None)


@pytest.mark.parametrize("where", ["in_bfloat16", "in_float32"])
def test_a_norms_result_is_made_again(where, request):
    if where == "in_bfloat16":
        request.getfixturevalue("in_bfloat16")
    given = [t.requires_grad_() for t in (bfloat16(2, 35, 64), bfloat16(64), bfloat16(90, 64), bfloat16(9, 64))]
    statistics = 70 * 4
    found = {}
    for again in (False, True):
        outputs, kept = kept_by(functools.partial(of_norm, again=again), *given)
        assert kept == statistics + (0 if again else given[0].nbytes)
        found[again] = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), given)
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))


def test_a_norms_result_is_made_again_by_the_backend_that_made_it(in_bfloat16):
    given = [torch.randn(*shape).requires_grad_() for shape in ((70, 64), (64,), (9, 64))]
    with lf.use_backend("reference"):
        (y,) = of_norm(*given, again=True)
        (expected,) = of_norm(*given, again=False)
    for a, b in zip(*(torch.autograd.grad(out.sum(), given) for out in (y, expected)), strict=True):
        assert torch.equal(a, b)


def test_a_norm_without_a_gradient_keeps_nothing_to_make_it_of(in_bfloat16):
    given = bfloat16(70, 64), bfloat16(64), bfloat16(9, 64).requires_grad_()
    (y,), kept = kept_by(functools.partial(of_norm, again=True), *given)
    assert kept == y.shape[0] * 64 * 2
    (dweight,) = torch.autograd.grad(y.sum(), given[2])
    torch.testing.assert_close(dweight, torch.autograd.grad(of_norm(*given, again=False)[0].sum(), given[2])[0])


def test_a_norm_that_changed_meanwhile_is_noticed(in_bfloat16):
    given = [t.requires_grad_() for t in (bfloat16(70, 64), bfloat16(64), bfloat16(9, 64))]
    (y,) = of_norm(*given, again=True)
    with torch.no_grad():
        given[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inductor_does_not_keep_the_result_of_a_norm_that_adds(in_bfloat16):
    """It could: what hangs on no gradient may be moved into the forward."""

    def layers(x, residual, norm_weight, *weights):
        y, h = lf.ops.rms_norm(x, norm_weight, residual=residual)
        return *_products.linears(y, weights, Normed(h, norm_weight, 1e-5)), h

    shapes = (70, 64), (70, 64), (64,), (90, 64), (9, 64)
    given = [bfloat16(*shape).requires_grad_() for shape in shapes]
    compiled = torch.compile(layers, fullgraph=True)
    compiled(*given)
    (*outputs, h), kept = kept_by(compiled, *given)
    assert kept == h.nbytes + 70 * 4
    found = torch.autograd.grad(sum(y.sum() for y in outputs), given)
    expected = torch.autograd.grad(sum(y.sum() for y in layers(*given)[:-1]), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["in_bfloat16", "in_float32"])
def test_layers_of_one_input_in_batches(where, request):
    if where == "in_bfloat16":
        request.getfixturevalue("in_bfloat16")
    x, weights = bfloat16(3, 70, 8), [bfloat16(n, 8).requires_grad_() for n in (9, 5)]
    batched = torch.vmap(lambda x: _products.linears(x, weights))(x)
    for i in range(3):
        for y, expected in zip(batched, _products.linears(x[i], weights), strict=True):
            torch.testing.assert_close(y[i], expected)


def test_gradients_of_layers_of_one_input_in_batches(in_bfloat16):
    given = [bfloat16(n, 8).requires_grad_() for n in (70, 9, 5)]
    outputs, dys = ours_of(*given), [bfloat16(4, 70, n) for n in (9, 5)]
    found = torch.autograd.grad(outputs, given, dys, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        expected = torch.autograd.grad(outputs, given, [dy[i] for dy in dys], retain_graph=True)
        for batch, one in zip(found, expected, strict=True):
            torch.testing.assert_close(batch[i], one)


@pytest.mark.parametrize("where", ["in_bfloat16", "in_float32"])
def test_a_frozen_layer_of_a_frozen_input_has_no_gradient(where, request):
    if where == "in_bfloat16":
        request.getfixturevalue("in_bfloat16")
    x, frozen, trained = bfloat16(70, 8), bfloat16(9, 8), bfloat16(5, 8).requires_grad_()
    outputs = _products.linears(x, [frozen, trained])
    assert [y.requires_grad for y in outputs] == [False, True]
    (dweight,) = torch.autograd.grad(outputs[1].sum(), trained)
    torch.testing.assert_close(dweight, x.sum(0).expand(5, 8), rtol=2e-2, atol=2e-2)


def test_a_second_derivative_behind_a_norm_is_right(in_bfloat16):
    """With respect to the layers' weights: the norm's own second derivative is refused."""
    given = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (3,), (5, 3), (2, 3))]

    def second():
        outputs = of_norm(*given, again=True)
        (dweight,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), given[2], create_graph=True)
        return torch.autograd.grad(dweight.square().sum(), given[:3])

    def stock():
        h, norm_weight, *weights = given
        x = norm_weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
        (dweight,) = torch.autograd.grad(sum((x @ w.T).square().sum() for w in weights), given[2], create_graph=True)
        return torch.autograd.grad(dweight.square().sum(), given[:3])

    for a, b in zip(second(), stock(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_nobody_uses(in_bfloat16):
    given = [bfloat16(n, 8).requires_grad_() for n in (70, 9, 5)]
    ours_of(*given)[1].sum().backward()
    assert given[1].grad is None
    torch.testing.assert_close(given[0].grad, given[2].detach().sum(0).expand(70, 8))


@pytest.mark.parametrize("large", [False, True])
def test_rows_that_only_the_data_tell_with_gradients(large, monkeypatch, in_bfloat16):
    monkeypatch.setattr(_products, "has_amx", lambda: True)
    if large:
        monkeypatch.setattr(_products, "_FEWEST_TRANSPOSED", (256, 1))
    x, weights = bfloat16(400, 8), [bfloat16(9, 8).requires_grad_(), bfloat16(5, 8).requires_grad_()]

    def loss(x):
        return sum(y.float().square().sum() for y in _products.linears(x[x[:, 0] > 0], weights))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), weights)
    for a, b in zip(found, torch.autograd.grad(loss(x), weights), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_of_one_input_on_meta():
    x, weight = torch.ones(3, 8, device="meta"), torch.ones(9, 8, device="meta", requires_grad=True)
    assert ours_of(x, weight)[0].shape == (3, 9)


def test_transposed_is_an_operator():
    if _compiled.missing is not None:
        pytest.skip(_compiled.missing)
    for rows, columns in ((1, 1), (33, 70), (0, 3)):
        x = bfloat16(rows, columns)
        assert torch.equal(torch.ops.lemur_fast.transposed(x), x.T)
    torch.library.opcheck(torch.ops.lemur_fast.transposed.default, (bfloat16(33, 70),))
