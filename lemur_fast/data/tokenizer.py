"""The tokenizer: a SentencePiece BPE model with byte fallback, as a Hugging Face fast tokenizer with the same ids.

LLaMA-2 and Mistral v1 ship `tokenizer.model`, a SentencePiece file. Loading that file alone with transformers 5.23
gives other ids on most texts (and still decodes them back to the text, so only comparing ids shows it).
`convert_sentencepiece` rebuilds the model piece by piece from the protobuf instead; `tests/data/test_tokenizer.py`
holds it to SentencePiece itself.
"""

import hashlib
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MISTRAL_V1_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
MISTRAL_V1_NOTICE = (
    "Mistral v1 SentencePiece model, 32,000 pieces, from the PyPI package mistral-common; Apache-2.0, Mistral AI"
)

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_MIXED = re.compile(
    f"[^{_SPACE}]{_SPACE}|.\n|\n.", re.DOTALL
)  # a piece that spaces or newlines do not begin or make up


def mistral_model_file() -> Path:
    """Path of `tokenizer.model.v1` inside the installed mistral-common, its hash checked.

    Raises:
        FileNotFoundError: mistral-common is not installed, or holds no such file.
        ValueError: the file is another one than this project was tested with.
    """
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "no tokenizer: the package mistral-common, which carries it, is not installed; "
            "run `pip install 'lemur_fast[recipes]'`, or give a model folder that has its own tokenizer"
        )
    path = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer: this version of mistral-common has no {path}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != MISTRAL_V1_SHA256:
        raise ValueError(f"{path} is not the expected tokenizer: sha256 {digest}, expected {MISTRAL_V1_SHA256}")
    return path


def convert_sentencepiece(path: str | Path) -> Tokenizer:
    """Rebuild a SentencePiece BPE model as a `tokenizers.Tokenizer` that gives the same ids.

    SentencePiece merges, at every step, the adjacent pair whose joined piece has the best score; `tokenizers` merges
    the pair that comes first in a list. So the list holds every way to split every piece in two, best score first.

    Args:
        path: a `tokenizer.model` file.

    Raises:
        FileNotFoundError: the packages that read the file are not installed.
        ValueError: the model uses a feature that this conversion would get wrong.
    """
    try:  # sentencepiece and the protobuf that it reads models with serve this conversion alone
        sentencepiece_model_pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise FileNotFoundError(
            f"no tokenizer: {error.name} is not installed, which reads {path}; run `pip install 'lemur_fast[recipes]'`"
        ) from error

    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(path).read_bytes())
    spec, kinds = proto.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    for feature, wanted, got in (
        ("model_type", proto.trainer_spec.BPE, proto.trainer_spec.model_type),
        ("byte_fallback", True, proto.trainer_spec.byte_fallback),
        ("treat_whitespace_as_suffix", False, proto.trainer_spec.treat_whitespace_as_suffix),
        ("add_dummy_prefix", True, spec.add_dummy_prefix),
        ("remove_extra_whitespaces", False, spec.remove_extra_whitespaces),
        ("precompiled_charsmap", b"", spec.precompiled_charsmap),
        ("user-defined pieces", 0, sum(piece.type == kinds.USER_DEFINED for piece in proto.pieces)),
    ):
        if got != wanted:
            raise ValueError(f"{path}: cannot convert a SentencePiece model with {feature} = {got!r} (only {wanted!r})")

    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    merges: list[tuple[float, int, int, str, str]] = []
    for index, piece in enumerate(proto.pieces):
        if piece.type != kinds.NORMAL:  # control and byte pieces are never the result of a merge
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-piece.score, index, vocab[left], left, right))
    merges.sort()

    unk, bos, eos = (proto.pieces[i].piece for i in (0, 1, 2))
    tokenizer = Tokenizer(
        models.BPE(vocab, [merge[-2:] for merge in merges], unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    if not any(_MIXED.search(piece) for piece in vocab):
        # No piece goes on past a space or a newline, so cutting there changes nothing, and words that come again are
        # found in a cache: 1.3 to 1.9 times as fast.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"\n|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (unk, bos, eos)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )
    return tokenizer


def load_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or the 32,000-piece Mistral v1 one when no folder is given.

    Raises:
        FileNotFoundError: there is no tokenizer to load.
        ValueError: it cannot be read, or has no end-of-sequence token, which every document needs.
    """
    if folder is None:
        return PreTrainedTokenizerFast(
            tokenizer_object=convert_sentencepiece(mistral_model_file()),
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
        )
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(f"no tokenizer in {folder}: it has no tokenizer.json, tokenizer.model or vocab.json")
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(
            f"{folder} has a tokenizer.model but no tokenizer.json, and transformers builds wrong ids from that file "
            "alone; write one with lemur_fast.data.tokenizer.convert_sentencepiece(PATH).save(tokenizer.json)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # that of the library tokenizers is of no kind of its own
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token; every document must end in one")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and of the ids of a probe: tokenizers that give the same ids have the same one."""
    probe = "def f(x):\n\treturn  x ** 2  # naïve\n\n  The 😀 \u4e2d\u6587 </s> 12,345.67 isn't HTTPServer\r\n"
    (ids,) = encode_documents(tokenizer, [probe])
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids.tolist()])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of whole documents: bos (where the tokenizer has one), the text, eos; on all cores.

    A document that contains "</s>" is text that speaks about control tokens: it gets the ids of its characters, never a
    control token. Length of a result: tokens of the text + 1 or 2, int32.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # Without the offsets and masks that a call of the tokenizer makes: 1.5 times as fast, and half of the memory.
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [np.array([*before, *ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]
