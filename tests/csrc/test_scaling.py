"""accumulate and scale on every instruction set this CPU has, on raw memory: every bit is determined."""

import itertools

import pytest
import torch
from torch import Tensor

from lemur_fast import _compiled
from lemur_fast._compiled import dtype_code
from tests.csrc.raw import DTYPES, WIDTHS, Output, strided

C = _compiled.C


def scaled(x: Tensor, factor: float, dtype: torch.dtype, shape: tuple[int, int], transposed: bool) -> Tensor:
    y = Output(shape, dtype)
    C.cpu.scale(
        x=x.data_ptr(),
        transposed=transposed,
        y=y.data_ptr(),
        rows=shape[0],
        cols=shape[1],
        factor=factor,
        x_dtype=dtype_code(x.dtype),
        y_dtype=dtype_code(dtype),
    )
    return y.written()


@pytest.mark.parametrize(("x_dtype", "y_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("transposed", [False, True])
def test_scale_rounds_once(isa, x_dtype, y_dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    # around the blocks of 32 columns by 256 rows in which a matrix is turned
    for rows, cols in [(1, 1), (3, 5), (16, 16), (17, 33), (255, 31), (256, 32), (257, 65), (600, 7), (5, 600)]:
        x = strided(1, rows * cols, x_dtype, generator)[0].view(rows, cols)
        want = (x.float() * 0.37).to(y_dtype)
        got = scaled(x, 0.37, y_dtype, (cols, rows) if transposed else (rows, cols), transposed)
        assert torch.equal(got, want.T if transposed else want), (rows, cols)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_accumulate_adds_in_float32(isa, dtype, add):
    generator = torch.Generator().manual_seed(0)
    for cols in WIDTHS:
        x = strided(1, 5 * cols, dtype, generator)[0].view(5, cols)
        wide = torch.full((5, cols + 4), float("nan"))
        total = wide[:, 1 : cols + 1]
        total.copy_(torch.randn(5, cols, generator=generator))
        want = total + x.float() if add else x.float()
        C.cpu.accumulate(
            total=total.data_ptr(),
            total_stride=total.stride(0),
            x=x.data_ptr(),
            rows=5,
            cols=cols,
            add=add,
            dtype=dtype_code(dtype),
        )
        assert torch.equal(total, want)
        assert wide[:, 0].isnan().all()
        assert wide[:, cols + 1 :].isnan().all()


def test_nothing_to_do(isa):
    empty = torch.empty(0, 5)
    assert scaled(empty, 2.0, torch.float32, (0, 5), False).numel() == 0
    assert scaled(empty, 2.0, torch.float32, (0, 5), True).numel() == 0
    C.cpu.accumulate(total=0, total_stride=5, x=0, rows=0, cols=5, add=True, dtype=0)


def test_bad_arguments_are_refused_by_name():
    x = torch.ones(4).data_ptr()
    scale = {"x": x, "transposed": False, "y": x, "rows": 1, "cols": 4, "factor": 1.0, "x_dtype": 0, "y_dtype": 0}
    for change, message in [
        ({"rows": -1}, "rows: got -1"),
        ({"cols": 0}, "cols: got 0"),
        ({"x": 0}, "x: got a null pointer"),
        ({"y": 0}, "y: got a null pointer"),
        ({"y_dtype": 5}, "y_dtype: got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            C.cpu.scale(**scale | change)
    accumulate = {"total": x, "total_stride": 4, "x": x, "rows": 1, "cols": 4, "add": True, "dtype": 0}
    for change, message in [({"total": 0}, "total: got a null"), ({"x": 0}, "x: got a null"), ({"rows": -2}, "rows: ")]:
        with pytest.raises(ValueError, match=message):
            C.cpu.accumulate(**accumulate | change)
