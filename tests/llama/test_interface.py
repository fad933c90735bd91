"""``attn_implementation="lemur_fast"`` in stock models."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, MistralConfig, MistralForCausalLM

from lemur_fast.llama import accelerate
from tests.llama.tiny import (
    VOCAB,
    assert_near,
    assert_same,
    documents,
    loss_and_gradients,
    packed,
    padded,
    separate_documents,
    tiny_llama,
)


@pytest.mark.parametrize("way", ["flash kwargs", "positions"])
def test_packed_documents_stay_apart(way: str) -> None:
    model = tiny_llama(attn_implementation="lemur_fast")
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=way == "flash kwargs")
    batch = dict(collate([{"input_ids": doc.tolist()} for doc in documents()]))
    assert_same(loss_and_gradients(model, **batch), separate_documents(tiny_llama(), documents()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_skipped(side: str) -> None:
    batch = padded(documents(), side)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    model, stock = tiny_llama(attn_implementation="lemur_fast"), tiny_llama()
    assert_same(loss_and_gradients(model, **batch), loss_and_gradients(stock, **batch))


def test_a_mask_of_four_dimensions_is_refused() -> None:
    model = tiny_llama(attn_implementation="lemur_fast")
    causal = torch.ones(20, 20).tril().bool()[None, None]
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[1, 1, 20, 20\].*takes \[B, T\]"):
        model(input_ids=torch.ones(1, 20, dtype=torch.long), attention_mask=causal, use_cache=False)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_gives_the_tokens_of_stock(cache: str | None) -> None:
    batch = padded(documents((7, 3, 12, 5)), "left")
    del batch["labels"]
    tokens = [
        tiny_llama(attn_implementation=name)
        .eval()
        .generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation=cache)
        for name in ("lemur_fast", "sdpa")
    ]
    assert torch.equal(*tokens)


def test_sliding_window_of_another_model() -> None:
    outputs = []
    for name in ("lemur_fast", "eager"):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=5,
            initializer_range=0.2,
            attn_implementation=name,
        )
        model = MistralForCausalLM(config).eval()
        outputs.append(model(torch.arange(1, 18)[None], use_cache=False).logits)
    assert_near(*outputs)


def test_beside_accelerate() -> None:
    """The cached and the masked path of an accelerated model may run on it, too."""
    model = tiny_llama(attn_implementation="lemur_fast")
    accelerate(model)
    assert_same(loss_and_gradients(model, **packed(documents())), separate_documents(tiny_llama(), documents()))
    ids = torch.randint(1, VOCAB, (2, 9))
    assert_near(model.eval()(ids).logits, tiny_llama().eval()(ids).logits)


def test_dropout_is_refused() -> None:
    model = tiny_llama(attn_implementation="lemur_fast", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout: got 0\.1; the attention of lemur_fast has none"):
        model(torch.ones(1, 4).long())
