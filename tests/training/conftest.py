from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lemur_fast.training.distributed import World, process_group


@pytest.fixture
def world() -> Iterator[World]:
    with process_group("cpu") as world:
        yield world


@pytest.fixture
def mesh(world: World) -> Any:
    return world.mesh


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """Makes the same small stock LLaMA every time; keywords go to its configuration."""

    def make(**options: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, "initializer_range": 0.2, **options})).train()

    return make


@pytest.fixture
def documents() -> list[np.ndarray]:
    """Eight documents of very different lengths, so that a mean of means is far from the mean."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, length) for length in (2, 3, 40, 5, 17, 2, 33, 8)]
