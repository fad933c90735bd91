"""The small models and batches that these tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lemur_fast.llama import accelerate

VOCAB = 101
LENGTHS = (7, 1, 12, 5)


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A stock LLaMA with grouped-query attention, in train mode, the same at every call."""
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # wide enough for attention to matter
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(config | overrides))).train()
    for name, parameter in model.named_parameters():  # a norm weight of ones would hide a wrong gradient
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def pair(**overrides: Any) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """An accelerated model and its stock twin."""
    stock = tiny_llama(**overrides)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    return ours, stock


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def packed(docs: list[Tensor]) -> dict[str, Tensor]:
    """input_ids, position_ids, cu_seqlens, and labels that say nothing of where documents end."""
    ids = torch.cat(docs)[None]
    lengths = torch.tensor([0, *(len(doc) for doc in docs)])
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.cat([torch.arange(len(doc)) for doc in docs])[None],
        "cu_seqlens": lengths.cumsum(0).int(),
    }


def padded(docs: list[Tensor], side: str) -> dict[str, Tensor]:
    """input_ids, attention_mask, and labels that are wrong at padding: input ids, as careless collators leave them."""
    longest = max(len(doc) for doc in docs)
    ids = torch.full((len(docs), longest), 9)
    mask = torch.zeros_like(ids)
    for row, doc in enumerate(docs):
        place = slice(0, len(doc)) if side == "right" else slice(longest - len(doc), longest)
        ids[row, place], mask[row, place] = doc, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def separate_documents(stock: LlamaForCausalLM, docs: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of documents run one by one through `stock`, as a mean over all their targets."""
    targets = sum(len(doc) - 1 for doc in docs)
    total = torch.zeros(())
    for doc in docs:
        if len(doc) > 1:
            total = total + stock(doc[None], labels=doc[None]).loss * (len(doc) - 1) / targets
    stock.zero_grad()
    total.backward()
    return total.detach(), gradients(stock)


def loss_and_gradients(model: torch.nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], rtol: float = 1e-5
) -> None:
    """Loss and every gradient agree to float32 rounding, measured against each tensor's largest element."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name}: the gradient is zero, so it proves nothing"
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Agreement to float32 rounding, measured against the largest element."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))
