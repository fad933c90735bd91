"""What a step must compute, and what the device could: their ratio is the model FLOPs utilization (MFU)."""

import time
from collections.abc import Iterable
from typing import Any

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


def matrix_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of one decoder layer, by their names in the model."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    h, i = config.hidden_size, config.intermediate_size
    q, kv = head * config.num_attention_heads, head * key_value_heads(config)
    attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
    return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}


def matrix_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Elements of the matrices that every token is multiplied with: in all layers, and in the output layer."""
    layer = sum(inputs * outputs for inputs, outputs in matrix_shapes(config).values())
    return config.num_hidden_layers * layer, config.vocab_size * config.hidden_size


def model_flops(config: LlamaConfig, lengths: Iterable[int], trained: int, lora: Any = None) -> float:
    """FLOPs of forward and backward over packed documents: what the mathematics asks for, whatever is recomputed.

    A product with a matrix of P elements is 2 P a token forward, 2 P for the gradient of its input, and 2 P for that of
    the matrix: 6 P in all (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), but 4 P where it is frozen, as under
    LoRA (Hu et al. 2021, arXiv 2106.09685), whose adapters of rank r add 6 r (inputs + outputs) to every matrix that
    has one. Attention has no weights: three times its forward in any case. It is causal and stays inside documents: a
    document of n tokens has n (n + 1) / 2 pairs, 4 D a head and pair forward. So it grows with the sum of squares of
    the lengths, not with the square of their sum.

    Args:
        config: of the model.
        lengths: tokens of each document; padding is no document.
        trained: tokens that have a target: only these meet the output layer.
        lora: a `peft.LoraConfig` of `lora.lora_config`: all else is frozen. Counted with the frozen matrices are the
            gradients of the first layer's inputs, which only a trained embedding needs.
    """
    layers, output = matrix_parameters(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = pairs = 0
    for length in lengths:
        tokens += length
        pairs += length * (length + 1) // 2
    attention = 3 * 4.0 * head * config.num_attention_heads * config.num_hidden_layers * pairs
    if lora is None:
        return 6.0 * layers * tokens + 6.0 * output * trained + attention
    sizes = [
        inputs + outputs for name, (inputs, outputs) in matrix_shapes(config).items() if name in lora.target_modules
    ]
    adapters = config.num_hidden_layers * lora.r * sum(sizes)
    of_output = 6.0 if "lm_head" in (lora.modules_to_save or ()) else 4.0
    return (4.0 * layers + 6.0 * adapters) * tokens + of_output * output * trained + attention


def peak_of(name: str) -> float | None:
    """Peak of the device whose name contains one of `PEAKS`, in FLOP/s; None where none fits."""
    matches = [model for model in PEAKS if all(word in name.replace("-", " ").split() for word in model.split())]
    return PEAKS[max(matches, key=len)] if matches else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of one process's device in `dtype`, and where the figure is from.

    Devices and dtypes without a datasheet's figure are measured: a large matrix product, about a second. A CPU may be
    faster at float32 than at 16 bits, and `accelerate` then multiplies bfloat16 so: the faster of the two is its peak.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if dtype == torch.bfloat16 and (peak := peak_of(name)):
        return peak, f"{name}, {peak / 1e12:,.0f} TFLOP/s by its datasheet"
    size = 4096 if device.type == "cuda" else 1024
    fastest = {}
    for multiplied in {dtype, torch.float32} if device.type == "cpu" else {dtype}:
        left, right = torch.randn(2, size, size, device=device).to(multiplied)
        seconds = []
        for _ in range(20):  # the fastest counts: on a machine that others use, most are slowed down
            begun = time.perf_counter()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
        fastest[multiplied] = min(seconds)
    best = min(fastest, key=lambda multiplied: fastest[multiplied])
    peak, called = 2 * size**3 / fastest[best], str(best).removeprefix("torch.")
    return peak, f"{name}, {peak / 1e12:,.2f} TFLOP/s in a {called} matrix product of {size}, measured"
