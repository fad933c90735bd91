import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lemur_fast.data.executors import build_store
from lemur_fast.data.pipeline import Settings
from lemur_fast.data.sources import Generated
from lemur_fast.data.tokenizer import load_tokenizer
from lemur_fast.training.interruption import Interruption

RECIPES = Path(__file__).parents[2] / "recipes"

SHAPE = ["--hidden-size", "32", "--intermediate-size", "64", "--layers", "2", "--heads", "2", "--kv-heads", "1"]
RUN_FILES = {
    *("run.json", "metrics.jsonl", "tensorboard", "loss.png", "samples.txt", "data", "model", "checkpoints", ".lock")
}
"""What a finished run leaves in its folder."""
MICRO = ["--seq-len", "256", "--batch-tokens", "1024", "--eval-tokens", "1024", "--warmup-steps", "2"]
MICRO += ["--lr", "2e-2", "--sample-tokens", "8", "--dtype", "float32"]


def load(name: str) -> Any:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pretrain() -> Any:
    """recipes/pretrain.py."""
    return load("pretrain")


@pytest.fixture(scope="session")
def chat() -> Any:
    """recipes/chat.py."""
    return load("chat")


@pytest.fixture(scope="session")
def generate() -> Any:
    """recipes/generate.py."""
    return load("generate")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of the standard library's shorter modules: real code and prose, made in a moment."""
    folder = tmp_path_factory.mktemp("data") / "store"
    make_store(folder, "[a-e]*.py", slice(40))
    return folder


def make_store(folder: Path, modules: str, titles: slice) -> None:
    """A token store of modules of the standard library and topics of its manual."""
    from pydoc_data.topics import topics

    code = [(path.name, path.read_text(), "PSF-2.0") for path in sorted(Path(os.__file__).parent.glob(modules))]
    text = [(title, topics[title], "PSF-2.0") for title in sorted(topics)[titles]]
    sources = [
        Generated("library", "code", "a test", "PSF-2.0", lambda: iter(code)),
        Generated("topics", "text", "a test", "PSF-2.0", lambda: iter(text)),
    ]
    build_store(folder, sources, load_tokenizer(), Settings(held_out=0.2), workers=1, progress=False)


def micro(*arguments: Any) -> list[str]:
    """`arguments` after those of a run that is over in a moment; a model that is continued brings its own shape."""
    given = [str(argument) for argument in arguments]
    shape = [] if {"--model", "smollm2-135m"} & set(given) else SHAPE
    return [*unless_given([*shape, *MICRO], given), *given]


def unless_given(options: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """Of options with a value each, those that are not among `given`."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for name, value in pairs if name not in given for word in (name, value)]


def run(pretrain: Any, *arguments: Any) -> int:
    """The recipe in this process; returns its exit code."""
    with Interruption() as interruption:
        return pretrain.pretrain(pretrain.parse(micro(*arguments)), interruption)


def launch(*arguments: Any, processes: int = 1) -> subprocess.Popen:
    """The recipe in processes of its own, one thread each."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0"]
    command += [str(RECIPES / "pretrain.py"), *micro(*arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
