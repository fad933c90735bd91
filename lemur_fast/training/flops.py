"""What a step must compute, and what the device could: their ratio is the model FLOPs utilization (MFU)."""

import time
from collections.abc import Iterable

import torch
from transformers import LlamaConfig

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
"""Dense bfloat16 products with float32 sums, FLOP/s, from the makers' datasheets; never the figure "with sparsity"."""


def key_value_heads(config: LlamaConfig) -> int:
    """Key and value heads; as many as query heads where the configuration does not say."""
    return config.num_key_value_heads or config.num_attention_heads


def matrix_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Elements of the matrices that every token is multiplied with: in all layers, and in the output layer."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head * 2 * (config.num_attention_heads + key_value_heads(config))
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * layer, config.vocab_size * config.hidden_size


def model_flops(config: LlamaConfig, lengths: Iterable[int], trained: int) -> float:
    """FLOPs of forward and backward over packed documents: what the mathematics asks for, whatever is recomputed.

    A product with a matrix of P elements is 2 P a token forward and twice that backward. Attention is causal and stays
    inside documents: a document of n tokens has n (n + 1) / 2 pairs, 4 D a head and pair forward. So it grows with the
    sum of squares of the lengths, not with the square of their sum.

    Args:
        config: of the model.
        lengths: tokens of each document; padding is no document.
        trained: tokens that have a target: only these meet the output layer.
    """
    layers, output = matrix_parameters(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = pairs = 0
    for length in lengths:
        tokens += length
        pairs += length * (length + 1) // 2
    attention = 4.0 * head * config.num_attention_heads * config.num_hidden_layers * pairs
    return 3 * (2.0 * layers * tokens + 2.0 * output * trained + attention)


def peak_of(name: str) -> float | None:
    """Peak of the device whose name contains one of `PEAKS`, in FLOP/s; None where none fits."""
    matches = [model for model in PEAKS if all(word in name.replace("-", " ").split() for word in model.split())]
    return PEAKS[max(matches, key=len)] if matches else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of one process's device in `dtype`, and where the figure is from.

    Devices and dtypes without a datasheet's figure are measured: a large matrix product, about a second.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if dtype == torch.bfloat16 and (peak := peak_of(name)):
        return peak, f"{name}, {peak / 1e12:,.0f} TFLOP/s by its datasheet"
    size = 4096 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(20):  # the fastest counts: on a machine that others use, most are slowed down
        begun = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    peak = 2 * size**3 / min(seconds)
    return peak, f"{name}, {peak / 1e12:,.2f} TFLOP/s in a matrix product of {size}, measured"
