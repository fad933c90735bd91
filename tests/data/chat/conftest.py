from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lemur_fast.data.chat.chatml import add_chat_tokens
from lemur_fast.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    """The tokenizer of 32,000 pieces, made to speak ChatML."""
    tokenizer = load_tokenizer()
    assert add_chat_tokens(tokenizer) == [32000, 32001, 32002, 32003, 32004]
    return tokenizer


def byte_level_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that has ChatML's tokens, as SmolLM2's has: bos is <|im_start|>, eos <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    special = options.pop("special", True)
    tokens = [AddedToken(token, special=special, normalized=False, **options) for token in control]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>" if special else None,
        eos_token="<|im_end|>" if special else None,
    )


@pytest.fixture(scope="session")
def chatml_tokenizer() -> Any:
    """A tokenizer that had <|im_start|> and <|im_end|> before."""
    tokenizer = byte_level_tokenizer()
    add_chat_tokens(tokenizer)
    return tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a file of the temporary folder and returns its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
