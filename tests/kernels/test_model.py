"""A training step of an accelerated model, every op of it through Triton's kernels."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lemur_fast as lf
from lemur_fast import dispatch
from tests.conftest import INTERPRETING

SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def training_step(model: LlamaForCausalLM, batch: lf.PackedBatch) -> dict[str, torch.Tensor]:
    loss = model(**batch.model_inputs()).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.skipif(not INTERPRETING, reason="ops give CPU tensors to Triton under TRITON_INTERPRET=1 alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_through_triton_alone(dtype, monkeypatch):
    documents = [torch.randint(0, 99, (length,)).tolist() for length in (30, 1, 45, 17)]
    batch = lf.PackedBatch.from_documents(documents).padded(tokens=100, documents=6)
    stock = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(dtype).train()
    model = copy.deepcopy(stock)
    lf.accelerate(model)
    chosen: list[str] = []
    implementation = dispatch.implementation

    def noting(op, backend, role):
        chosen.append(backend)
        return implementation(op, backend, role)

    for op in ("attention", "cross_entropy", "linear_cross_entropy", "rms_norm", "rotary", "swiglu"):
        monkeypatch.setattr(sys.modules[f"lemur_fast.ops.{op}"], "implementation", noting)
    with lf.use_backend("triton"):
        got = training_step(model, batch)
    assert set(chosen) == {"triton"}
    chosen.clear()
    model.zero_grad()
    with lf.use_backend("reference"):
        want = training_step(model, batch)
    assert set(chosen) == {"reference"}
    for name in want:
        difference = float((got[name].double() - want[name].double()).norm() / want[name].double().norm())
        assert difference < (1e-5 if dtype == torch.float32 else 0.03), (name, difference)
