"""The chat store: what is kept, what is counted, and batches that train on what they should and as if one by one."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import lemur_fast as lf
from lemur_fast.data.chat import sources
from lemur_fast.data.chat.chatml import ChatEncoder
from lemur_fast.data.chat.conversation import Conversation, Message, Unfit, checked
from lemur_fast.data.chat.example import colored, show
from lemur_fast.data.chat.sources import ChatSource, embedded_chat_sources
from lemur_fast.data.chat.store import build_chat_store, describe
from lemur_fast.data.loader import Loader, held_out_batches
from lemur_fast.data.mixture import Mixture
from lemur_fast.training.step import accumulate


def talk(*contents, name=""):
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], content) for i, content in enumerate(contents)), name)


def source(name, items):
    return ChatSource(name, "a test", "CC0-1.0", lambda: iter(items))


@pytest.fixture(scope="module")
def conversations():
    """Forty conversations of very different lengths, of one to four exchanges."""
    rng = np.random.default_rng(0)
    words = ["lemur", "tree", "Leaf", "jump", "42", "é"]

    def content():
        return " ".join(rng.choice(words, rng.integers(1, 12)))

    return [talk(*(content() for _ in range(2 * rng.integers(1, 5))), name=str(i)) for i in range(40)]


@pytest.fixture
def build(tmp_path, chatml_tokenizer):
    def build(*given, max_tokens=512, **options):
        options = {"held_out": 0.0} | options
        return build_chat_store(tmp_path / "data", given, chatml_tokenizer, max_tokens, **options)

    return build


def test_documents_are_what_the_encoder_gives(build, conversations, chatml_tokenizer):
    store = build(source("talks", conversations), max_tokens=1024)
    assert len(store.train) == len(conversations)
    assert len(store.held_out) == 0
    for index, encoded in enumerate(ChatEncoder(chatml_tokenizer)(conversations)):
        assert store.train.tokens(index).tolist() == encoded.ids.tolist()
        assert store.train.trained(index).tolist() == encoded.trained.tolist()
        assert store.train.trained(index, 3, 40).tolist() == encoded.trained[3:43].tolist()
        assert store.train.name(index) == f"talks/{index}"
    entry = store.manifest["sources"]["talks"]
    assert entry["train"]["trained"] == sum(store.train.trained(i).sum() for i in range(len(store.train)))
    assert entry["train"]["tokens"] == store.train.lengths.sum()


def test_everything_that_is_left_out_is_counted(build):
    fit = talk("a", "b")
    items = [fit, Unfit("missing field 'x'"), talk("", "b"), talk("a"), talk(" a", "b\n"), talk("a", "x " * 400)]
    store = build(source("one", items), source("two", [fit, talk("c", "d", "e")]))
    one, two = (store.manifest["sources"][name] for name in ("one", "two"))
    dropped = {"missing field 'x'": 1, "empty user message": 1, "no answer to train on": 1, "exact duplicate": 1}
    assert one["dropped"] == dropped | {"over-long, nothing left": 1}
    assert two["dropped"] == {"exact duplicate": 1}
    assert (one["conversations"], one["train"]["documents"], two["train"]["documents"]) == (6, 1, 1)
    assert one["overlong"] == {"conversations": 1, "pieces": 0, "trained_tokens_lost": 2 * 400 - 1 + 2}
    text = describe(store)
    for words in ("6 conversations", "1 missing field 'x'", "1 exact duplicate", "licence: CC0-1.0", "801 trained tok"):
        assert words in text


def test_near_duplicates_are_counted_by_source(build, tmp_path):
    long = "Which colour has a lemur that sits in the sun all day long and looks at the sea?"
    one = [talk(long, "It is grey, and its tail has rings."), talk("Hi!", "Hello.")]
    two = [talk("Say! " + long, "It is grey, and its tail has rings."), talk("Hi", "Hello"), talk(long, "Red")]
    store = build(source("one", one), source("two", two))
    assert [store.manifest["sources"][name]["dropped"] for name in ("one", "two")] == [{}, {"near duplicate": 1}]
    assert store.manifest["chat"]["near_duplicates"] == 0.7
    assert [store.manifest["sources"][name]["train"]["documents"] for name in ("one", "two")] == [2, 2]
    assert len(store.train) == 4
    assert "3 conversations, dropped: 1 near duplicate" in describe(store)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"train", "held_out", "manifest.json"}


def test_near_duplicates_may_stay(build):
    items = [talk(f"Which colour has a lemur that sits in the sun all day{mark}", "Grey") for mark in "?!"]
    assert len(build(source("s", items), near_duplicates=0).train) == 2
    with pytest.raises(ValueError, match=r"near_duplicates must be in \[0, 1\], got 2"):
        build(source("s", items), near_duplicates=2)


@pytest.mark.parametrize(("overlong", "pieces"), [("split", 3), ("truncate", 1), ("drop", 0)])
def test_overlong_conversations(build, overlong, pieces):
    store = build(source("s", [talk(*["word " * 20] * 6), talk("a", "b")]), max_tokens=320, overlong=overlong)
    assert store.manifest["sources"]["s"]["overlong"]["pieces"] == pieces
    assert len(store.train) == pieces + 1
    assert store.train.lengths.max() <= 320
    if overlong == "split":
        assert [store.train.name(i) for i in range(3)] == ["s/#1", "s/#2", "s/#3"]


def test_conversations_that_begin_alike_are_held_out_together(build):
    items = [talk(f"question {i // 2}", f"answer {i}") for i in range(200)]
    store = build(source("s", items), held_out=0.3)

    sides = [
        {tuple(d.tokens(i)[: int(np.flatnonzero(d.trained(i))[0])]) for i in range(len(d))}
        for d in (store.train, store.held_out)
    ]
    assert len(store.train) + len(store.held_out) == 200
    assert len(sides[0]) + len(sides[1]) == 100
    assert 15 <= len(sides[1]) <= 45


def test_sources_with_nothing_and_with_one_name_are_refused(build, tmp_path):
    with pytest.raises(ValueError, match=r"'s' gives nothing to train on: 1 conversations, dropped: 1 missing field"):
        build(source("s", [Unfit("missing field 'x'")]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="two sources have the same name: s, s"):
        build(source("s", []), source("s", []))
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\)"):
        build(source("s", []), held_out=1.0)


# ---- packed ----------------------------------------------------------------------------------------------------------


def model(vocab_size):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, initializer_range=0.2, **shape)
    return LlamaForCausalLM(config).train()


def test_packed_is_one_by_one(build, conversations, chatml_tokenizer):
    """Loss and gradients of a step of two packed rows, against stock Hugging Face on each conversation alone."""
    store = build(source("talks", conversations), max_tokens=1024)
    rows, batches = next(Loader(store.train, Mixture(store.train, {"talks": 1.0}, 1024, seed=0), 2))
    documents = [segment.document for row in rows for segment in row]
    assert len(documents) > 4
    assert all(segment.length == store.train.lengths[segment.document] for row in rows for segment in row)  # whole
    for row, batch in zip(rows, batches, strict=True):
        assert batch.num_tokens == 1024
        starts = batch.cu_seqlens[:-1][batch.cu_seqlens.diff() > 0].long()
        assert batch.position_ids[starts].tolist() == [0] * len(row)
        assert int(batch.num_items) == sum(int(store.train.trained(s.document).sum()) for s in row)

    packed = lf.accelerate(model(len(chatml_tokenizer))).model
    loss = accumulate(packed, batches)

    stock = model(len(chatml_tokenizer))
    encoded = ChatEncoder(chatml_tokenizer)([conversations[document] for document in documents])
    count = sum(int(e.trained.sum()) for e in encoded)
    total = torch.zeros(())
    for e in encoded:
        labels = torch.from_numpy(np.where(e.trained, e.ids, -100).astype(np.int64))[None]
        ids = torch.from_numpy(e.ids.astype(np.int64))[None]
        one = stock(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(count)).loss
        one.backward()
        total += one.detach()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(packed.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_held_out_bytes_are_those_of_the_answers(build, chatml_tokenizer):
    store = build(source("s", [talk(f"question {i}", "é!") for i in range(200)]), held_out=0.3)
    part = held_out_batches(store.held_out, "s", 10**6, 512, chatml_tokenizer)
    assert part.tokens == 5 * len(store.held_out)  # two bytes of é, "!", <|im_end|>, the line's end
    assert part.bytes == 4 * len(store.held_out)  # <|im_end|> spells nothing


# ---- the embedded conversations --------------------------------------------------------------------------------------


def test_the_embedded_conversations_are_those_we_name():
    for found in embedded_chat_sources():
        counted, fit = Counter(), 0
        for item in found.read():
            try:
                checked(item)
                fit += 1
            except Unfit as unfit:
                counted[str(unfit)] += 1
        if found.name == "chitchat":
            assert (fit, counted["only one side speaks"]) == (4008, 3150)
        elif found.name == "chatterbot":
            assert fit == 2025
        else:
            assert fit > 3000  # of any Python's standard library
            assert set(counted) <= {"function that only has a docstring", "docstring that shares a line with code"}
        assert found.licence


def test_functions_become_exercises():
    pairs = {item.name: item for item in sources._read_python_functions() if isinstance(item, Conversation)}
    question, answer = pairs["textwrap.dedent"].messages
    assert "`dedent(text)`" in question.content
    assert "Remove any common leading whitespace from every line in `text`." in question.content
    assert answer.content.startswith("```python\ndef dedent(text):\n")
    code = answer.content.removeprefix("```python\n").removesuffix("\n```")
    assert '"""' not in code.split("\n")[1]
    compile(code, "dedent", "exec")
    method = pairs["queue.Queue.task_done"].messages
    assert "method `task_done(self)` of the class `Queue`" in method[0].content
    assert method[1].content.startswith("```python\ndef task_done(self):\n    ")


def test_a_package_that_is_missing_or_changed_is_named(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"the package chitchat-dataset, .*pip install 'lemur_fast\[recipes\]'"):
        next(sources._read_chitchat())
    monkeypatch.undo()
    monkeypatch.setattr(sources, "CHATTERBOT_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is not what this project was tested with: sha256 905a1d"):
        next(sources._read_chatterbot())


# ---- what --show-example prints --------------------------------------------------------------------------------------


def test_an_example_is_coloured_by_what_is_trained_on(chatml_tokenizer, llama_tokenizer):
    for tokenizer in (chatml_tokenizer, llama_tokenizer):
        case = Conversation((Message("user", "[red]é?"), Message("assistant", "naïve 😀"), *talk("c", "d").messages))
        (encoded,) = ChatEncoder(tokenizer)([case])
        text = colored(encoded, tokenizer, marks=False)
        green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
        assert green.replace(" \n", "\n") == "naïve 😀<|im_end|>\nd<|im_end|>\n"
        assert "[red]é?" in text.plain
        plain = io.StringIO()
        show(encoded, tokenizer, "one", Console(file=plain, width=200))
        assert "⟦naïve 😀<|im_end|>" in plain.getvalue()
        assert plain.getvalue().count("⟦") == 3  # the legend and two answers
        shown = io.StringIO()
        show(encoded, tokenizer, "one", Console(file=shown, force_terminal=True, color_system="standard"))
        assert "\x1b[1;32mnaïve 😀" in shown.getvalue()
        assert "⟦" not in shown.getvalue()
