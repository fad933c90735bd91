import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


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
