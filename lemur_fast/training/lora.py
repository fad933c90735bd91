"""LoRA by peft: adapters on every linear layer of the decoder, and what remains of them when they are merged."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lemur_fast.training.saving import saved_folder

_PREFIX = "base_model.model."  # of the model's parameters inside a PeftModel


def lora_config(rank: int, alpha: int, tokens_are_new: bool, tied: bool) -> Any:
    """A `peft.LoraConfig` for a LLaMA.

    Args:
        rank: of the adapters.
        alpha: their sum is scaled by alpha / rank.
        tokens_are_new: whether tokens that the model has to write were added. Their rows all begin as the same mean: it
            must be able to tell them apart, so embedding and output layer are then trained in full.
        tied: whether those two are one.

    Raises:
        ValueError: `tokens_are_new` and `tied`: peft would train two copies and untie them.
    """
    from peft import LoraConfig

    if tokens_are_new and tied:
        raise ValueError(
            "--lora-rank: this model's embedding and output layer are one, and its tokenizer had no ChatML tokens: "
            "LoRA would have to untie them. Tune it fully (--lora-rank 0)"
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        modules_to_save=["embed_tokens", "lm_head"] if tokens_are_new else None,
        task_type="CAUSAL_LM",
    )


def name_in_file(name: str) -> str | None:
    """The name that a parameter of a PeftModel has in the files of the model it is made from; None for adapters."""
    if ".lora_" in name:
        return None
    for inside in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(inside, "")
    return name.removeprefix(_PREFIX)


def adapters(model: torch.nn.Module, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix of the adapters and its first value: A as peft draws it, in every process the same; B zero."""
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            first = torch.empty(down.shape)
            torch.nn.init.kaiming_uniform_(first, a=5**0.5, generator=generator)
            yield down, first
            yield up, torch.zeros(up.shape)


def merge(config: LlamaConfig, lora: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Save the adapters of a trained PeftModel in `folder`, for `PeftModel.from_pretrained`, and merge them.

    Args:
        config: of the model.
        lora: the `LoraConfig`.
        state: whole weights of the PeftModel. They are merged in place, to hold no second copy: where they are those of
            a model in memory, as in a single process on a CPU, it is of no more use.
        folder: replaced, if it is there.

    Returns:
        The weights of a LlamaForCausalLM that gives what the adapted one does.
    """
    from peft import get_peft_model

    with torch.device("meta"):
        model: Any = get_peft_model(LlamaForCausalLM(config), lora)
    model.load_state_dict(dict(state), assign=True)
    if config.tie_word_embeddings:
        model.get_base_model().tie_weights()
    with saved_folder(folder) as staging:
        model.save_pretrained(staging, save_embedding_layers=False)  # where they are trained, they are adapters
    return dict(model.merge_and_unload().state_dict())
