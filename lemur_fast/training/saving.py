"""Run folders, and models saved so that stock transformers loads them."""

import itertools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    pipeline,
)

from lemur_fast.files import LOCK, claimed, staged_folder, write_json
from lemur_fast.training.distributed import REFUSALS


def run_folder(out: Path | None, default: str | Path, overwrite: bool = False, resume: bool = False) -> Path:
    """Make the folder of a run: new or empty, and writable; or find the one to resume.

    Args:
        out: the folder that the user asked for, or None for `default`, numbered when it is taken.
        default: such as `runs/pretrain-tiny`; the next ones are `runs/pretrain-tiny-2`, `-3` and so on.
        overwrite: delete the earlier run in `out`.
        resume: return the run that is in `out`, or the latest of the numbered ones, if there is one.

    Raises:
        FileExistsError: `out` is not empty, and was not to be deleted, is no run, or is at work.
        OSError: the folder cannot be made.
    """
    default = Path(default)
    if resume:
        numbers = _numbered(default)
        runs = [out] if out else sorted(numbers, key=lambda run: numbers[run])
        runs = [run for run in runs if (run / "run.json").is_file()]
        if runs:
            return runs[-1]
    if out is None:
        numbered = (default.with_name(f"{default.name}-{number}") for number in itertools.count(2))
        out = next(folder for folder in itertools.chain([default], numbered) if not _taken(folder))
    elif _taken(out):
        if not overwrite:
            raise FileExistsError(f"--out {out} is not empty: choose another folder, or delete it with --overwrite")
        if not (out / "run.json").is_file():
            raise FileExistsError(f"--overwrite: {out} holds no run.json, so it is no run, and is left alone")
        with claimed(out):
            shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _taken(folder: Path) -> bool:
    """Whether something is there that a new run must not touch."""
    if folder.is_dir():
        return any(path.name != LOCK for path in folder.iterdir())
    return folder.exists() or folder.is_symlink()


def _numbered(default: Path) -> dict[Path, int]:
    """The folders that `run_folder` has made of `default`, with their numbers."""
    found = {}
    for path in default.parent.glob("*"):
        if match := re.fullmatch(rf"{re.escape(default.name)}(?:-(\d+))?", path.name):
            found[path] = int(match[1] or 1)
    return found


@contextmanager
def recorded(folder: Path, record: Mapping[str, Any]) -> Iterator[None]:
    """Make a claimed folder a run's, by a run.json with `record`; one that is a run's already stays as it is.

    A run that is refused before it trains takes back what it has made: no later one shall go on from it.
    """
    if (folder / "run.json").exists():
        yield
        return
    write_json(folder / "run.json", record)
    try:
        yield
    except REFUSALS:
        if {path.name for path in folder.iterdir()} <= {"run.json", "data", LOCK}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def saved_folder(folder: Path) -> Iterator[Path]:
    """`staged_folder` in the place of an older one, for Hugging Face's libraries.

    Raises:
        OSError: it cannot be written, also where these call a full disk otherwise.
    """
    try:
        with staged_folder(folder, replace=True) as staging:
            yield staging
    except Exception as error:
        if type(error) not in (SafetensorError, Exception):  # the latter is that of tokenizers
            raise
        raise OSError(f"{folder} cannot be written: {error}") from error


def save_model(
    folder: Path,
    config: LlamaConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
) -> None:
    """Write a Hugging Face model folder: config, fp32 safetensors, tokenizer, generation config.

    A stock model is made without memory of its own, given the weights, and saved: what was trained, wrapped and patched
    leaves no trace. The folder appears only when it is whole; one from before the run went on is replaced.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.config.dtype = torch.float32
    model.generation_config = generation
    with saved_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def sample(folder: Path, prompts: Mapping[str, str], max_tokens: int, seed: int) -> str:
    """What the saved model writes after each prompt, loaded by stock transformers as anybody would."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    texts = []
    for kind, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=max_tokens)
        texts.append(f"--- a sample of {kind}\n{tokenizer.decode(output[0], skip_special_tokens=True)}\n")
    return "".join(texts)


def answers(folder: Path, questions: Sequence[str], max_tokens: int, seed: int) -> str:
    """What the saved chat model answers to each question, loaded by stock transformers as anybody would."""
    answer: Any = pipeline("text-generation", model=str(folder))
    torch.manual_seed(seed)
    texts = []
    for question in questions:
        (output,) = answer([{"role": "user", "content": question}], max_new_tokens=max_tokens)
        texts.append(f"--- {question}\n{output['generated_text'][-1]['content'].strip()}\n")
    return "".join(texts)
