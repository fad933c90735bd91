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
    def bfloat16_at_full_rate() -> bool: ...
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
    @staticmethod
    def swiglu_fwd(
        gate: int,
        gate_stride: int,
        up: int,
        up_stride: int,
        y: int,
        rows: int,
        cols: int,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def swiglu_bwd(
        dy: int,
        dy_stride: int,
        gate: int,
        gate_stride: int,
        up: int,
        up_stride: int,
        dgate: int,
        dup: int,
        rows: int,
        cols: int,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def rotary(
        items: list[tuple[int, int, int, int, int]],
        cos: int,
        cos_stride: int,
        sin: int,
        sin_stride: int,
        columns: int,
        tokens: int,
        head_dim: int,
        interleaved: bool,
        backward: bool,
        x_dtype: int,
        y_dtype: int,
        table_dtype: int,
    ) -> None: ...
    @staticmethod
    def cross_entropy_fwd(
        logits: int,
        logits_stride: int,
        labels: int,
        loss: int,
        lse: int,
        log_prob: int,
        entropy: int,
        correct: int,
        dloss: int,
        dlogits: int,
        rows: int,
        cols: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def cross_entropy_bwd(
        dloss: int,
        logits: int,
        logits_stride: int,
        labels: int,
        lse: int,
        dlogits: int,
        rows: int,
        cols: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def cross_entropy_sum(
        logits: int,
        logits_stride: int,
        labels: int,
        total: int,
        items: int,
        lse: int,
        log_prob: int,
        entropy: int,
        correct: int,
        dlogits: int,
        rows: int,
        cols: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def trained_rows(labels: int, rows: int, vocab: int, ignore_index: int, out: int) -> int: ...
    @staticmethod
    def sum_losses(loss: int, labels: int, rows: int, ignore_index: int, total: int, items: int) -> None: ...
    @staticmethod
    def attention_fwd(
        cu_seqlens: int,
        cu_seqlens_k: int,
        num_documents: int,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        out: int,
        lse: int,
        query_tokens: int,
        key_tokens: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        window: int,
        softcap: float,
        scale: float,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def attention_bwd(
        cu_seqlens: int,
        cu_seqlens_k: int,
        num_documents: int,
        dout: tuple[int, int, int],
        dlse: int,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        out: tuple[int, int, int],
        lse: int,
        dq: int,
        dk: int,
        dv: int,
        query_tokens: int,
        key_tokens: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        window: int,
        softcap: float,
        scale: float,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def accumulate(total: int, total_stride: int, x: int, rows: int, cols: int, add: bool, dtype: int) -> None: ...
    @staticmethod
    def scale(
        x: int, transposed: bool, y: int, rows: int, cols: int, factor: float, x_dtype: int, y_dtype: int
    ) -> None: ...

class cuda:
    """There only when CUDA was built (`build_info()["cuda"]`)."""

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
        device: int,
        stream: int,
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
        partial: int,
        parts: int,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def swiglu_fwd(
        gate: int,
        gate_stride: int,
        up: int,
        up_stride: int,
        y: int,
        rows: int,
        cols: int,
        dtype: int,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def swiglu_bwd(
        dy: int,
        dy_stride: int,
        gate: int,
        gate_stride: int,
        up: int,
        up_stride: int,
        dgate: int,
        dup: int,
        rows: int,
        cols: int,
        dtype: int,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def rotary(
        items: list[tuple[int, int, int, int, int]],
        cos: int,
        cos_stride: int,
        sin: int,
        sin_stride: int,
        columns: int,
        tokens: int,
        head_dim: int,
        interleaved: bool,
        backward: bool,
        x_dtype: int,
        y_dtype: int,
        table_dtype: int,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def cross_entropy_fwd(
        logits: int,
        logits_stride: int,
        labels: int,
        loss: int,
        lse: int,
        log_prob: int,
        entropy: int,
        correct: int,
        dloss: int,
        dlogits: int,
        rows: int,
        cols: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        dtype: int,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def cross_entropy_bwd(
        dloss: int,
        logits: int,
        logits_stride: int,
        labels: int,
        lse: int,
        dlogits: int,
        rows: int,
        cols: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        dtype: int,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def driver_version() -> int: ...
    @staticmethod
    def device_count() -> int: ...
    @staticmethod
    def self_test(device: int = 0) -> int: ...
