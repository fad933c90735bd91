"""The count against torch's own counter, and the peaks against the names that drivers give."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from lemur_fast.training.flops import model_flops, peak_flops, peak_of
from lemur_fast.training.lora import lora_config


def counted(model, tokens):
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None] % 96, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_products_are_those_that_torch_counts(make_model):
    model, tokens = make_model(attn_implementation="eager"), 40
    heads, head, layers = 4, 8, 2
    pairs = 3 * 4 * head * heads * layers * tokens**2  # eager attention computes the masked half, too
    ours = model_flops(model.config, [tokens], tokens)
    masked = 3 * 4 * head * heads * layers * (tokens**2 - tokens * (tokens + 1) // 2)
    assert ours + masked == counted(model, tokens)
    assert pairs > masked > 0


@pytest.mark.parametrize("tokens_are_new", [False, True])
def test_frozen_weights_cost_no_gradient(make_model, tokens_are_new):
    tokens, rank = 40, 4
    base = make_model(attn_implementation="eager", tie_word_embeddings=False)
    config, lora = base.config, lora_config(rank, 8, tokens_are_new, tied=False)
    model = get_peft_model(base, lora)
    masked = 3 * 4 * 8 * 4 * 2 * (tokens**2 - tokens * (tokens + 1) // 2)
    # Only a trained embedding asks for gradients of the first layer's inputs: of q, k, v (32 + 16 + 16 outputs) and of
    # their adapters.
    first = 0 if tokens_are_new else 2 * 32 * (32 + 16 + 16 + 3 * rank) * tokens
    assert model_flops(config, [tokens], tokens, lora) + masked == counted(model, tokens) + first
    whole, adapted = (model_flops(config, [tokens], 0, given) for given in (None, lora))
    assert whole - adapted == 2 * tokens * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) - 6 * tokens * 2 * rank * (
        2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    )


def test_documents_count_by_their_squares_and_untrained_tokens_skip_the_head(make_model):
    config = make_model().config
    parts = sum(model_flops(config, [n], n - 1) for n in (3, 30, 7))
    assert model_flops(config, [3, 30, 7], 37) == parts
    assert parts < model_flops(config, [40], 37)
    assert model_flops(config, [40], 40) - model_flops(config, [40], 30) == 3 * 2 * 10 * 96 * 32


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_by_the_driver_s_name(name, tflops):
    assert peak_of(name) == tflops * 1e12


def test_a_device_without_a_datasheet_is_measured():
    assert peak_of("Tesla K80") is None
    peak, origin = peak_flops(torch.device("cpu"), torch.float32)
    assert peak > 1e8
    assert "measured" in origin
