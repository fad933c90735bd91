"""The CUDA launchers: which kernel, widths of all kinds, pointers out of alignment, devices, streams, errors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import INTERPRETING
from tests.criterion import assert_as_good
from tests.cuda.simulated import cross_entropy, modules, parameters, processors, rms_norm, rotary, simulated, swiglu
from tests.kernels.test_rows import PLAIN, check_norm, losses, rotated
from tests.ptxsim import Fault

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(INTERPRETING, reason="executes machine code, which Triton's interpreter has no part in"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch fills what it allocates without values with NaN: an element that no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class CudaKernels:
    """As the fixture `kernels` of tests/kernels has them."""

    rms_norm, swiglu, cross_entropy, rotary, processors = (
        rms_norm,
        swiglu,
        cross_entropy,
        rotary,
        staticmethod(processors),
    )


def check_swiglu(gate: Tensor, up: Tensor, dy: Tensor) -> None:
    def formula(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = torch.nn.functional.silu(gate) * up
        return y.detach(), *torch.autograd.grad(y, (gate, up), dy)

    got = (swiglu.forward(gate, up), *swiglu.backward(dy, gate, up))
    stock, exact = formula(gate, up, dy), formula(gate.double(), up.double(), dy.double())
    for name, *triple in zip(("y", "dgate", "dup"), got, stock, exact, strict=True):
        assert_as_good(name, *triple)


def check_loss(logits: Tensor, **options: float) -> None:
    rows, cols = logits.shape
    options = PLAIN | options
    labels = torch.randint(0, cols, (rows,))
    labels[0] = -100
    dloss = torch.randn(rows)
    loss, lse, *_ = cross_entropy.forward(logits, labels, False, **options)
    dlogits = cross_entropy.backward(dloss, logits, labels, lse, **options)
    stock = losses(logits, labels, dloss, **options)
    exact = losses(logits.double(), labels, dloss.double(), **options)
    for name, got, peer, want in zip(("loss", "lse", "dlogits"), (loss, lse, dlogits), stock, exact, strict=True):
        assert_as_good(name, got, peer.to(got.dtype), want, floor=2**-20)


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> None:
    for transposed in (False, True):
        dtype = q.dtype if transposed else torch.promote_types(q.dtype, cos.dtype)
        got = rotary.rotate(q, k, cos, sin, interleaved, dtype, transposed)
        for x, y in zip((q, k), got, strict=True):
            wide = rotated(x.to(dtype), cos.to(torch.promote_types(q.dtype, cos.dtype)), sin, interleaved, transposed)
            exact = rotated(x, cos.double(), sin.double(), interleaved, transposed)
            assert_as_good("rotated", y, wide.to(y.dtype), exact)


# ---- widths ----------------------------------------------------------------------------------------------------------

WIDTHS = [1, 2, 3, 5, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 255, 257, 511, 513, 1000, 1024, 2047, 2056,
          4095, 4097, 5120, 8191, 8200, 11_008, 19_999, 20_000]  # fmt: skip
"""Up to 20,000: a thread's, a warp's and a block's share, one less and one more; primes; LLaMA's own."""

EVERY_SO_MANY = 97
"""Of the widths up to 20,000, those that the slow test takes."""


def check_width(cols: int, dtype: torch.dtype) -> None:
    rows = 5 if cols < 1000 else 2
    with processors(2):
        check_norm(CudaKernels, rows, cols, dtype, 0, cols % 2 == 0)
    check_swiglu(*(torch.randn(rows, cols).to(dtype) for _ in range(3)))
    check_loss((3 * torch.randn(rows, cols)).to(dtype))


@pytest.mark.parametrize("cols", WIDTHS)
def test_widths(cols):
    with simulated():
        check_width(cols, DTYPES[cols % 3])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20_000, 2000))
def test_many_more_widths(first):
    with simulated():
        for cols in range(first + 1, first + 2001, EVERY_SO_MANY):
            check_width(cols, DTYPES[cols % 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 20, 64, 80, 96, 128, 256, 1030])
def test_head_dims(dtype, head_dim):
    q, k = (torch.randn(3, heads, head_dim).to(dtype) for heads in (4, 2))
    with simulated():
        for interleaved in (False, True):
            for width in (head_dim, head_dim // 2):
                cos, sin = (torch.randn(3, width).to(dtype) for _ in range(2))
                check_rotary(q, k, cos, sin, interleaved)


# ---- alignment -------------------------------------------------------------------------------------------------------


def out_of_step(values: Tensor, by: int, apart: int = 0) -> Tensor:
    """The same values, `by` elements past an address that 16 divides, rows `apart` further elements apart."""
    width = values[0].numel() + apart
    memory = torch.empty(by + width * values.shape[0], dtype=values.dtype)
    assert memory.data_ptr() % 16 == 0
    inner = torch.empty(values.shape[1:]).stride()
    return memory.as_strided(values.shape, (width, *inner), by).copy_(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by", [1, 2, 3, 4, 5, 7, 8])
def test_pointers_out_of_step(dtype, by):
    """One tensor of each op after the other; a store or load that is out of alignment would fault."""
    shapes = {"x": (3, 136), "residual": (3, 136), "dy": (3, 136), "dh": (3, 136)}
    values = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    weight = torch.randn(136).to(dtype)
    with simulated(processors=2):
        y, h, rstd = rms_norm.forward(values["x"], values["residual"], weight, 1e-5)
        gradients = rms_norm.backward(values["dy"], values["dh"], h, weight, rstd, True)
        for moved in [*values, "h", "weight"]:
            here = {name: out_of_step(v, by) if name == moved else v for name, v in values.items()}
            w = out_of_step(weight[None], by)[0] if moved == "weight" else weight
            again = rms_norm.forward(here["x"], here["residual"], w, 1e-5)
            assert all(torch.allclose(a, b, rtol=2**-7) for a, b in zip(again, (y, h, rstd), strict=True))
            moved_h = out_of_step(h, by) if moved == "h" else h
            again = rms_norm.backward(here["dy"], here["dh"], moved_h, w, rstd, True)
            for a, b in zip(again, gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        for apart in (0, 1, 8):
            gate, up, dy = (out_of_step(torch.randn(3, 136).to(dtype), by, apart) for _ in range(3))
            check_swiglu(gate, up, dy)
            check_loss(out_of_step(torch.randn(3, 136).to(dtype), by, apart))
        for interleaved in (False, True):
            q, k = (out_of_step(torch.randn(3, heads, 32).to(dtype), by, 8) for heads in (2, 1))
            table = out_of_step(torch.randn(3, 32).to(dtype), by, 8)
            check_rotary(q, k, table, torch.randn(3, 32).to(dtype), interleaved)


def test_aligned_rows_take_16_bytes_at_a_time():
    """And others one element: a check that the tests above run both."""
    x, w = torch.randn(3, 136).bfloat16(), torch.ones(136).bfloat16()
    with simulated() as launches:
        rms_norm.forward(x, None, w, 1e-5)
        rms_norm.forward(out_of_step(x, 1), None, w, 1e-5)
        rms_norm.forward(out_of_step(x, 0, apart=1), None, w, 1e-5)
    aligned, moved, apart = launches
    assert aligned.counts.loads.wide_bytes == aligned.counts.loads.bytes
    assert moved.counts.loads.wide_bytes == apart.counts.loads.wide_bytes == 0
    assert "8, true" in aligned.name
    assert "1, false" in moved.name


def test_strides_count_only_where_there_are_rows():
    x = torch.randn(8, 12).bfloat16()  # in one piece: 96 elements, which 8 divides
    row = torch.randn(1, 17).bfloat16()[:, :16]
    with simulated() as launches:
        swiglu.forward(x, x)
        swiglu.backward(x, x, x)
        rms_norm.forward(row, None, torch.ones(16).bfloat16(), 1e-5)
        rms_norm.backward(row, None, row, torch.ones(16).bfloat16(), torch.ones(1), False)
        cross_entropy.forward(row, torch.zeros(1, dtype=torch.int64), False, **PLAIN)
    assert all(launch.counts.loads.wide_bytes > 0 for launch in launches)


@pytest.mark.parametrize("cols", [32_768, 32_776])
def test_the_widest_rows_that_registers_hold_and_wider_ones(cols):
    with simulated(processors=1) as launches:
        check_norm(CudaKernels, 2, cols, torch.bfloat16, 0, True)
    assert ("true" in launches[0].name) == (cols <= 32_768)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_norms_of_mixed_dtypes(x_dtype, w_dtype):
    x, w, dy = torch.randn(4, 136).to(x_dtype), torch.randn(136).to(w_dtype), torch.randn(4, 136)
    with simulated(processors=2):
        y, _, rstd = rms_norm.forward(x, None, w, 1e-5)
        dx, dw = rms_norm.backward(dy.to(y.dtype), None, x, w, rstd, True)
    assert y.dtype == torch.promote_types(x_dtype, w_dtype)
    assert torch.equal(y, (x.float() * rstd[:, None]).to(x_dtype) * w)
    x_hat = x.double() * rstd[:, None]
    g = dy.to(y.dtype).double() * w.double()
    want = rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    torch.testing.assert_close(dx.double(), want, rtol=2 * torch.finfo(x_dtype).eps, atol=1e-5)
    want = (dy.to(y.dtype).double() * x_hat.to(x_dtype).double()).sum(0)
    torch.testing.assert_close(dw.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_of_mixed_dtypes(x_dtype, table_dtype, interleaved):
    q, k = (torch.randn(3, heads, 32).to(x_dtype) for heads in (2, 1))
    cos, sin = (torch.randn(3, 32).to(table_dtype) for _ in range(2))
    wide = torch.promote_types(x_dtype, table_dtype)
    with simulated():
        for transposed in (False, True):
            given = [x.to(wide) if transposed else x for x in (q, k)]
            got = rotary.rotate(*given, cos, sin, interleaved, x_dtype if transposed else wide, transposed)
            for x, y in zip(given, got, strict=True):
                exact = rotated(x, cos.double(), sin.double(), interleaved, transposed)
                assert y.dtype == (x_dtype if transposed else wide)
                torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-5)


def test_dtypes_that_no_kernel_was_built_for():
    x, w = torch.randn(2, 8).bfloat16(), torch.ones(8).half()
    with simulated() as launches, pytest.raises(ValueError, match="got a weight of float16; takes bfloat16"):
        raw(rms_norm_arguments(x, w))
    assert not launches


# ---- where it runs, and what goes wrong ------------------------------------------------------------------------------


def rms_norm_arguments(x: Tensor, w: Tensor) -> dict[str, object]:
    """For the binding itself, past the op's own preparations."""
    y, rstd = torch.empty_like(x), torch.empty(len(x))
    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    pointers = {"x": x, "weight": w, "y": y, "rstd": rstd}
    return {name: t.data_ptr() for name, t in pointers.items()} | {
        "x_stride": x.shape[1], "residual": 0, "residual_stride": 0, "h": 0, "rows": len(x), "cols": x.shape[1],
        "eps": 1e-5, "x_dtype": codes[x.dtype], "w_dtype": codes[w.dtype], "device": 0, "stream": 0,
    }  # fmt: skip


def raw(arguments: dict[str, object]) -> None:
    from tests.cuda.simulated import module

    module().rms_norm_fwd(**arguments)


def every_op(x: Tensor) -> list[Callable[[], object]]:
    """Each launcher, on small tensors."""
    w, rstd = torch.ones(x.shape[1], dtype=x.dtype), torch.ones(len(x))
    heads, table = x[:, None].repeat(1, 2, 1), torch.ones(x.shape, dtype=x.dtype)
    labels = torch.zeros(len(x), dtype=torch.int64)
    return [
        lambda: rms_norm.forward(x, None, w, 1e-5),
        lambda: rms_norm.backward(x, None, x, w, rstd, True),
        lambda: swiglu.forward(x, x),
        lambda: swiglu.backward(x, x, x),
        lambda: rotary.rotate(heads, heads, table, table, False, x.dtype, False),
        lambda: cross_entropy.forward(x, labels, False, **PLAIN),
        lambda: cross_entropy.backward(rstd, x, labels, rstd, **PLAIN),
    ]


def test_the_device_and_the_stream_of_the_tensors():
    """Not the current ones; and the current device is what it was."""
    from tests.cuda.simulated import module

    x = torch.randn(3, 16)
    for device in (0, 1):
        with simulated(device=device, stream=77, execute=False) as launches:
            for call in every_op(x):
                call()
        assert len(launches) == 8  # the backward of rms_norm has two
        assert {(launch.device, launch.stream) for launch in launches} == {(device, 77)}
        assert module().current_device() == 0


def test_an_error_names_the_op_and_its_shapes():
    x = torch.randn(3, 16).bfloat16()
    names = ["rms_norm forward of", "rms_norm backward of", "swiglu forward of", "swiglu backward of", "rotary of",
             "cross_entropy forward of", "cross_entropy backward of"]  # fmt: skip
    for call, name in zip(every_op(x), names, strict=True):
        with simulated(device=1, status=9), pytest.raises(RuntimeError) as caught:
            call()
        message = str(caught.value)
        shape = "3 tokens, 2 and 2 heads of 16, bfloat16" if name == "rotary of" else "[3, 16] bfloat16"
        assert message == f"CUDA: {name} {shape} on device 1, or an earlier call: the error in words (the error's name)"


def test_a_device_that_is_not_there():
    x = torch.randn(3, 16)
    with simulated(device=7) as launches, pytest.raises(RuntimeError, match=r"swiglu forward of \[3, 16\].* device 7"):
        swiglu.forward(x, x)
    assert not launches


def test_nothing_to_do_launches_nothing():
    nothing = torch.empty(0, 16)
    labels = torch.empty(0, dtype=torch.int64)
    with simulated() as launches:
        rms_norm.forward(nothing, None, torch.ones(16), 1e-5)
        assert swiglu.forward(nothing, nothing).shape == (0, 16)
        swiglu.backward(nothing, nothing, nothing)
        cross_entropy.forward(nothing, labels, True, torch.empty(0), torch.empty(0, 16), **PLAIN)
        cross_entropy.backward(torch.empty(0), nothing, labels, torch.empty(0), **PLAIN)
        heads = torch.empty(0, 2, 16)
        rotary.rotate(heads, heads, nothing, nothing, False, torch.float32, False)
        assert not launches
        dx, dw = rms_norm.backward(nothing, None, nothing, torch.ones(16), torch.empty(0), True)
    assert dx.shape == (0, 16)
    assert torch.equal(dw, torch.zeros(16))


def test_the_bits_are_the_same_again():
    """Where no kernel adds to memory that others add to, every sum has one order, whichever block runs first."""
    adding = re.compile(r"\b(?:atom|red)\.\S+")
    assert adding.findall("red.global.add.f32 [%rd1], %f1; redux.sync.add.s32 %r1, %r2, %r3;") == ["red.global.add.f32"]
    for module in modules():
        assert ".entry" in module
        assert not adding.findall(module)


def test_columns_past_what_an_int_holds():
    arguments = rms_norm_arguments(torch.randn(1, 8), torch.ones(8)) | {"cols": 2**30}
    with simulated(), pytest.raises(ValueError, match=r"rms_norm: cols: got 1073741824; takes fewer than 2\^30"):
        raw(arguments)


FAR = 2**31 + 16


@pytest.mark.parametrize(
    ("call", "stride"),
    [
        (lambda x, w, ones: rms_norm.forward(x, None, w, 1e-5), "x_stride"),
        (lambda x, w, ones: rms_norm.forward(x, x, w, 1e-5), "residual_stride"),
        (lambda x, w, ones: rms_norm.backward(x, x, x.clone(), w, ones, True), "h_stride"),
        (lambda x, w, ones: rms_norm.backward(x, x.clone(), x.clone(), w, ones, True), "dh_stride"),
        (lambda x, w, ones: swiglu.forward(x[:, :128], x[:, :128]), "up_stride"),
        (lambda x, w, ones: swiglu.backward(x[:, :128], x[:, :128], x[:, :128]), "dy_stride"),
        (lambda x, w, ones: cross_entropy.forward(x, ones.long(), False, **PLAIN), "logits_stride"),
        (lambda x, w, ones: cross_entropy.backward(ones, x, ones.long(), ones, **PLAIN), "logits_stride"),
        (lambda x, w, ones: rotary.rotate(x[:, None], x[:, None], x, x, False, x.dtype, False), "k_token"),
        (lambda x, w, ones: rotary.rotate(x.view(1, 2, -1), x[None], x[:1], x[:1], True, x.dtype, False), "q_head"),
        (lambda x, w, ones: rotary.rotate(x[:, None], x[:, None], x, x.clone(), False, x.dtype, False), "sin_stride"),
    ],
)
def test_offsets_past_2_31(call, stride):
    """A row that lies so far away is looked for there: the fault names the place."""
    x = torch.randn(2, 136).bfloat16()
    with simulated(processors=1, execute=False) as launches:
        call(x, torch.ones(136).bfloat16(), torch.ones(2))
    launches[0].arguments[stride] = FAR
    with pytest.raises(Fault, match=r"out of bounds: .* (\d+) bytes past the end") as caught:
        launches[0].execute()
    (past,) = re.findall(r"(\d+) bytes past", str(caught.value))
    assert abs(int(past) - 2 * FAR) < 2**20  # from whichever tensor is the nearest


def test_names_of_parameters():
    assert parameters("sum_rows_kernel") == ("x", "total", "rows", "cols")
    with pytest.raises(ValueError, match="kernel: got 'no_kernel'"):
        parameters("no_kernel")
