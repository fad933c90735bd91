"""Run folders, and models saved so that stock transformers loads them."""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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

from lemur_fast.files import staged_folder


def numbered_folder(base: str | Path) -> Path:
    """Make and return the first of `base`, `base-2`, `base-3`, ... that does not exist or is an empty folder."""
    base = Path(base)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir() or any(folder.iterdir()):
                continue
        return folder
    raise AssertionError("unreachable")


def run_folder(out: Path | None, default: str | Path, overwrite: bool = False, resume: bool = False) -> Path:
    """Make the folder of a run: new or empty, and writable; or find the one to resume.

    Args:
        out: the folder that the user asked for, or None for `default`, numbered when it is taken.
        default: such as `runs/pretrain-tiny`.
        overwrite: delete the earlier run in `out`.
        resume: return the run that is in `out`, or the latest of the numbered ones, if there is one.

    Raises:
        FileExistsError: `out` is not empty, and was not to be deleted or is no run.
        OSError: the folder cannot be made.
    """
    if resume:
        runs = [out] if out else sorted(Path(default).parent.glob(f"{Path(default).name}*"), key=_number)
        runs = [run for run in runs if (run / "run.json").is_file()]
        if runs:
            for left in (*runs[-1].glob(".*.partial"), *runs[-1].glob(".*.old")):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
            return runs[-1]
    if out is None:
        return numbered_folder(default)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise FileExistsError(f"--out {out} is not empty: choose another folder, or delete it with --overwrite")
        if not (out / "run.json").is_file():
            raise FileExistsError(f"--overwrite: {out} holds no run.json, so it is no run, and is left alone")
        shutil.rmtree(out)
    return numbered_folder(out)


def _number(run: Path) -> int:
    """The number at the end of a run's name; those of other names come first."""
    last = run.name.rpartition("-")[2]
    return int(last) if last.isdecimal() else 1


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
    with staged_folder(folder, replace=True) as staging:
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
