"""The converted tokenizer against SentencePiece itself: ids, never just round trips."""

import importlib.util
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from lemur_fast.data import tokenizer as module
from lemur_fast.data.tokenizer import convert_sentencepiece, encode_documents, load_tokenizer, mistral_model_file

BY_HAND = [
    "",
    " ",
    "   ",
    "\n",
    "\t\t\n\r\n  x",
    " leading and trailing ",
    "a  b   c    d" + " " * 100 + "e",
    "def f(x):\n\tif x:\n\t\treturn  x\n",
    "0123456789 3.14159 1e-10 0xFF",
    "</s>",
    "<s>not a control token</s> <unk>",
    "a<s>b</s>c<unk>d",
    "<0x0A><0x41>",
    "\x00\x01\x7f",
    "\u2581\u2581already a space piece\u2581",
    "naïve café e\u0301 \ufb01 \u1e9b\u0323",  # not normalised: no accent may be composed
    "日本語のテキスト 한국어 العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦🏴‍☠️ \U0010ffff",
    "\ufeff\u200b\u00a0\u3000\u2028",
]


def many_texts() -> list[str]:
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::3]
    texts = [*BY_HAND, *(path.read_text(encoding="utf-8") for path in library), *topics.values()]
    rng = np.random.default_rng(0)
    for low, high in ((0, 128), (0, 0x800), (0x2000, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)):
        texts += ["".join(map(chr, rng.integers(low, high, rng.integers(1, 60)))) for _ in range(50)]
    texts += ["".join(rng.choice([" ", "  ", "\n", "\t", "a", ".", "<s>"], 40)) for _ in range(50)]
    return texts


@pytest.fixture(scope="module")
def sentence_piece() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(mistral_model_file()))


def test_ids_are_those_of_sentencepiece(tokenizer, sentence_piece):
    texts = many_texts()
    assert len(texts) > 400
    expected = [[1, *ids, 2] for ids in sentence_piece.encode(texts)]
    wrong = [
        text[:60]
        for text, ids, wanted in zip(texts, encode_documents(tokenizer, texts), expected, strict=True)
        if ids.tolist() != wanted
    ]
    assert wrong == []


def test_ids_survive_saving_and_loading_by_stock_transformers(tokenizer, sentence_piece, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text in many_texts() if "<s>" not in text and "</s>" not in text and "<unk>" not in text][::4]
    assert loaded(texts)["input_ids"] == [[1, *ids] for ids in sentence_piece.encode(texts)]
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 2, 32000)


def test_decoding_gives_the_text_back(tokenizer):
    texts = [text for text in many_texts() if "\u2581" not in text]  # SentencePiece reads that one as a space
    ids = encode_documents(tokenizer, texts)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == texts


def test_control_strings_in_a_document_are_text(tokenizer):
    (ids,) = encode_documents(tokenizer, ["<s>hi</s><unk>"])
    assert ids.dtype == np.int32
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {0, 1, 2} & set(ids[1:-1].tolist())


def test_another_model_file_is_refused(tmp_path, monkeypatch):
    fake = tmp_path / "mistral_common"
    (fake / "data").mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "data" / "tokenizer.model.v1").write_bytes(mistral_model_file().read_bytes() + b"\0")
    spec = importlib.util.spec_from_file_location("mistral_common", fake / "__init__.py")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="not the expected tokenizer: sha256"):
        load_tokenizer()


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'lemur_fast\[recipes\]'"):
        load_tokenizer()


@pytest.mark.parametrize(
    ("feature", "change"),
    [
        ("add_dummy_prefix", lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False)),
        ("remove_extra_whitespaces", lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True)),
        ("byte_fallback", lambda proto: setattr(proto.trainer_spec, "byte_fallback", False)),
        ("user-defined pieces", lambda proto: setattr(proto.pieces[500], "type", 4)),
    ],
)
def test_models_that_cannot_be_converted_are_refused_by_name(tmp_path, feature, change):
    proto = sentencepiece_model_pb2.ModelProto.FromString(mistral_model_file().read_bytes())
    change(proto)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=feature):
        convert_sentencepiece(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(mistral_model_file().read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
