"""``attn_implementation="lemur_fast"`` in stock models."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import create_causal_mask

from lemur_fast.llama import accelerate
from lemur_fast.llama.binding import CACHE
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


@pytest.mark.parametrize("way", ["cu_seqlens", "seq_idx"])
def test_documents_without_positions_that_restart(way: str) -> None:
    batch = packed(documents())
    lengths, labels = batch["cu_seqlens"].diff(), batch["labels"].clone()
    labels[0, batch["cu_seqlens"][:-1].long()] = -100  # stock knows no documents in its loss
    ways = {"cu_seqlens": batch["cu_seqlens"], "seq_idx": torch.arange(len(lengths)).repeat_interleave(lengths)[None]}
    model = tiny_llama(attn_implementation="lemur_fast")
    ours = loss_and_gradients(model, input_ids=batch["input_ids"], labels=labels, **{way: ways[way]})
    assert_same(ours, separate_documents(tiny_llama(), documents()))
    cached = model.eval()(batch["input_ids"])
    with pytest.raises(ValueError, match=f"{way}: got documents beside a KV cache"):
        model(batch["input_ids"][:, :3], past_key_values=cached.past_key_values, **{way: ways[way]})


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


@pytest.mark.parametrize("lengths", [(7, 3, 12, 5), (9, 9)], ids=["padded", "whole"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_gives_the_tokens_of_stock(cache: str | None, lengths: tuple[int, ...]) -> None:
    batch = padded(documents(lengths), "left")
    del batch["labels"]
    tokens = [
        tiny_llama(attn_implementation=name)
        .eval()
        .generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation=cache)
        for name in ("lemur_fast", "sdpa")
    ]
    assert torch.equal(*tokens)


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def mistral(implementation: str) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5, attn_implementation=implementation)).eval()


def test_sliding_window_of_another_model() -> None:
    assert_near(*(mistral(name)(torch.arange(1, 18)[None], use_cache=False).logits for name in ("lemur_fast", "eager")))


@pytest.mark.parametrize("tokens", [3, 9], ids=["shorter than the window", "longer"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_over_a_sliding_window(cache: str, tokens: int) -> None:
    ids = torch.randint(1, VOCAB, (2, tokens))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    assert torch.equal(*(mistral(name).generate(ids, **options) for name in ("lemur_fast", "eager")))


@pytest.mark.parametrize("tokens", [5, 8, 11])
def test_another_models_padding_is_no_padding_of_the_queries(tokens: int) -> None:
    """Cross-attention: the mask is that of the encoder's tokens, which are eight."""
    outputs = []
    for name in ("lemur_fast", "eager"):
        torch.manual_seed(0)
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
        config = BartConfig(
            vocab_size=VOCAB, d_model=64, max_position_embeddings=32, init_std=0.2, attn_implementation=name, **sizes
        )
        model = BartForConditionalGeneration(config).eval()
        mask = torch.ones(2, 8).long()
        mask[1, 5:] = 0
        ids, target = torch.arange(5, 21).view(2, 8), torch.arange(5, 5 + 2 * tokens).view(2, tokens)
        outputs.append(model(ids, attention_mask=mask, decoder_input_ids=target).logits)
    assert_near(*outputs)


def test_more_than_a_causal_mask_is_refused() -> None:
    model = tiny_llama(attn_implementation="lemur_fast")
    arguments = {"config": model.config, "inputs_embeds": torch.zeros(1, 4, 64), "attention_mask": None, CACHE: None}
    for custom in ("or_mask_function", "and_mask_function"):
        with pytest.raises(ValueError, match="mask_function: got more than a causal mask"):
            create_causal_mask(**arguments, **{custom: lambda batch, head, query, key: query >= 0})


def test_attention_in_chunks_is_refused() -> None:
    config = Llama4TextConfig(
        **SMALL, head_dim=16, attention_chunk_size=4, num_local_experts=2, attn_implementation="lemur_fast"
    )
    with pytest.raises(ValueError, match="layer_types: got 'chunked_attention'"):
        Llama4ForCausalLM(config)(torch.ones(1, 9).long())


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
