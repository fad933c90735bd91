"""The planner's sums, held to counts that others publish and to what autograd keeps."""

import pytest
import torch
from transformers import LlamaConfig

import lemur_fast as lf
from lemur_fast.packing import PackedBatch
from lemur_fast.training.plan import plan

LLAMA2_7B = LlamaConfig(vocab_size=32000, rms_norm_eps=1e-5)
LLAMA2_70B = LlamaConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip
SMALL = {"gpus": 8, "shard_size": None, "seq_len": 4096, "micro_batches": 1, "checkpointing": "none"}
SMALL |= {"sync_every": True, "device": "H100", "mfu": 0.4}


def test_parameters_are_those_of_the_published_models():
    assert plan(LLAMA2_7B, **SMALL).parameters == 6_738_415_616
    assert plan(LLAMA2_70B, **SMALL).parameters == 68_976_648_192
    smollm2 = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    assert plan(smollm2, **SMALL).parameters == 134_515_008


def test_states_are_shared_and_speed_follows_the_peak():
    eight, hybrid = plan(LLAMA2_7B, **SMALL), plan(LLAMA2_7B, **{**SMALL, "shard_size": 4})
    assert eight.parts["optimizer, float32"] == 8 * 6_738_415_616 / 8
    assert hybrid.parts["optimizer, float32"] == 8 * 6_738_415_616 / 4
    assert eight.tokens_per_second == pytest.approx(0.4 * 989e12 / eight.flops_per_token)
    assert 6 * 6.6e9 < eight.flops_per_token < 6 * 7.5e9
    assert "an estimate" in eight.describe(10**9)
    assert "DOES NOT FIT" in plan(LLAMA2_70B, **SMALL).describe(10**9)
    fits = plan(LLAMA2_70B, **{**SMALL, "gpus": 64, "checkpointing": "selective"}).describe(10**9)
    assert "DOES NOT FIT" not in fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "K80"}, "--plan-device K80: no datasheet"),
        ({"mfu": 0}, "--plan-mfu must be above 0"),
        ({"gpus": 6, "shard_size": 4}, "a multiple of --shard-size, got 6"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(LLAMA2_7B, **{**SMALL, **changes})


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_activations_are_what_autograd_keeps(make_model, mode):
    """Per layer: the difference between a model of six layers and one of two."""
    from lemur_fast.training.activations import checkpoint_activations

    tokens = 512
    kept = {}
    for layers in (2, 6):
        model = make_model(num_hidden_layers=layers, hidden_size=64, intermediate_size=176).bfloat16()
        lf.accelerate(model)
        checkpoint_activations(model, mode)
        seen = {}

        def keep(tensor, seen=seen):
            if tensor.numel() >= tokens and not isinstance(tensor, torch.nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**PackedBatch.from_documents([torch.randint(0, 96, (tokens,))]).model_inputs())
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept[layers] = sum(t.numel() * t.element_size() for pointer, t in seen.items() if pointer not in weights)
        del output
    shape = {**SMALL, "seq_len": tokens, "checkpointing": mode}
    config = model.config
    estimates = [plan(_with_layers(config, layers), **shape).parts["activations, bfloat16"] for layers in (2, 6)]
    estimated, found = estimates[1] - estimates[0], kept[6] - kept[2]
    if mode == "selective":  # what the selective contexts keep is outside of these hooks: a bound is all there is
        assert found < estimated
    else:
        assert estimated == pytest.approx(found, rel=0.15)


def _with_layers(config, layers):
    return LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers})
