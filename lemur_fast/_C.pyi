"""What csrc/bindings.cpp offers. Pointers are integers (`Tensor.data_ptr()`), 0 for absent; strides count elements."""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class DType(IntEnum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

def build_info() -> dict[str, Any]: ...
def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]: ...

class cpu:
    @staticmethod
    def isa() -> str: ...
    @staticmethod
    def isas() -> list[str]: ...
    @staticmethod
    def features() -> list[str]: ...
    @staticmethod
    def threads() -> int: ...
    @staticmethod
    def rms_norm_fwd(
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        weight: int,
        y: int,
        h: int,
        rstd: int,
        rows: int,
        cols: int,
        eps: float,
        x_dtype: int,
        w_dtype: int,
    ) -> None: ...
    @staticmethod
    def rms_norm_bwd(
        dy: int,
        dy_stride: int,
        dh: int,
        dh_stride: int,
        h: int,
        h_stride: int,
        weight: int,
        rstd: int,
        dx: int,
        dw: int,
        rows: int,
        cols: int,
        x_dtype: int,
        w_dtype: int,
    ) -> None: ...

class cuda:
    """There only when CUDA was built (`build_info()["cuda"]`)."""

    @staticmethod
    def driver_version() -> int: ...
    @staticmethod
    def device_count() -> int: ...
    @staticmethod
    def self_test(device: int = 0) -> int: ...
