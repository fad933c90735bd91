"""Every format against records as they are published, and every way in which one may be broken."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from lemur_fast.data.chat.conversation import Conversation, Message, Unfit, checked
from lemur_fast.data.chat.formats import FORMATS
from lemur_fast.data.chat.sources import parse_source


def read(form, *records):
    return list(FORMATS[form](records))


def said(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def reasons(items):
    found = []
    for item in items:
        try:
            checked(item)
        except Unfit as unfit:
            found.append(str(unfit))
    return found


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_sharegpt():
    record = {"id": "QWJhYvA_0", "system": "", "conversations": []}
    record["conversations"] = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (found,) = read("sharegpt", record)
    assert said(found) == [("user", "Hi"), ("assistant", "Hello")]
    assert found.name == "QWJhYvA_0"
    record["conversations"].insert(0, {"from": "system", "value": "Be kind"})
    assert said(read("sharegpt", record)[0])[0] == ("system", "Be kind")


def test_orca():
    record = {"id": "niv.242684", "system_prompt": "Think.", "question": "Why?", "response": "So."}
    assert said(read("orca", record)[0]) == [("system", "Think."), ("user", "Why?"), ("assistant", "So.")]
    assert said(read("orca", record | {"system_prompt": ""})[0]) == [("user", "Why?"), ("assistant", "So.")]


def test_evol():
    assert said(read("evol", {"instruction": "Sort", "output": "sorted(x)"})[0]) == [
        *(("user", "Sort"), ("assistant", "sorted(x)"))
    ]
    with_input = {"instruction": "Sort\n", "input": "[2, 1]", "output": "[1, 2]"}
    assert said(read("evol", with_input)[0])[0] == ("user", "Sort\n\n[2, 1]")


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    first = {"role": "assistant", "content": "c", "weight": 0}
    record = {"messages": [{"role": "user", "content": parts}, first, {"role": "assistant", "content": "d"}]}
    (found,) = read("messages", record)
    assert found.messages == (Message("user", "ab"), Message("assistant", "c", False), Message("assistant", "d"))


def node(name, role, *replies, rank=None, **more):
    return {"message_id": name, "role": role, "text": name, "rank": rank, "replies": list(replies), **more}


TREE = node(
    "q",
    "prompter",
    node("good", "assistant", node("thanks", "prompter", node("bye", "assistant")), node("why", "prompter"), rank=0),
    node("bad", "assistant", rank=1),
    node("gone", "assistant", deleted=True, rank=2),
)


def flattened(tree, parent=None):
    row = {key: value for key, value in tree.items() if key != "replies"} | {"parent_id": parent}
    yield row | {"message_tree_id": "q", "tree_state": "ready_for_export"}
    for reply in tree["replies"]:
        yield from flattened(reply, tree["message_id"])


@pytest.mark.parametrize("flat", [False, True])
def test_openassistant_trains_every_answer_once(flat):
    tree = {"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": TREE}
    found = read("oasst", *(flattened(TREE) if flat else [tree]))
    assert reasons(found) == ["deleted message"]
    trained = [m.content for c in found if isinstance(c, Conversation) for m in checked(c).messages if m.trained]
    answers = [content for content in trained if content in ("good", "bye", "bad", "gone")]
    assert sorted(answers) == ["bad", "bye", "good"]
    ways = [[content for _, content in said(c)] for c in found if isinstance(c, Conversation)]
    assert ways == [["q", "good", "thanks", "bye"], ["q", "bad"]]  # best first; "why" has no answer that is not there


def test_openassistant_counts_what_it_leaves_out():
    bad_state = {"tree_state": "aborted_low_grade", "prompt": TREE}
    alone = {"tree_state": "ready_for_export", "prompt": node("q", "prompter")}
    orphan = {"message_id": "x", "parent_id": "lost", "role": "assistant", "text": "x"}
    found = reasons(read("oasst", bad_state, alone, {"text": "x"}, orphan))
    assert found == [
        *("tree in state 'aborted_low_grade'", "no answer to train on", "missing field 'prompt'"),
        "message that no root leads to",
    ]


def test_an_openassistant_answer_of_a_way_that_is_unfit_is_trained_in_another():
    unfit = node("thanks", "prompter", node("", "assistant", rank=0), rank=0)
    fit = node("why", "prompter", node("so", "assistant"), rank=1)
    tree = node("q", "prompter", node("a", "assistant", unfit, fit))
    found = read("oasst", {"tree_state": "ready_for_export", "prompt": tree})
    assert reasons(found) == ["empty assistant message"]
    (whole,) = [item for item in found if isinstance(item, Conversation)]
    assert [message.content for message in whole.messages if message.trained and message.role == "assistant"] == [
        "a",
        "so",
    ]


@pytest.mark.parametrize("change", [{"replies": ["x"]}, {"replies": "x"}, {"rank": "first"}])
def test_openassistant_trees_of_another_form_are_counted(change):
    tree = node("q", "prompter", node("a", "assistant") | change)
    assert reasons(read("oasst", {"prompt": tree})) == ["replies or ranks of another form"]


def test_openassistant_messages_that_answer_one_another_are_counted():
    circle = [{"message_id": a, "parent_id": b, "role": "assistant", "text": "x"} for a, b in (("1", "2"), ("2", "1"))]
    assert reasons(read("oasst", *circle)) == ["message that no root leads to"] * 2


def test_an_openassistant_question_may_end_a_way_that_trains_something():
    tree = node("q", "prompter", node("a", "assistant", node("more", "prompter")))
    (found,) = read("oasst", {"prompt": tree})
    assert said(checked(found)) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("form", "record", "reason"),
    [
        ("sharegpt", {"id": 1}, "missing field 'conversations'"),
        ("sharegpt", {"conversations": "x"}, "field 'conversations' that is not a list of objects"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "missing field 'value'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": 3}]}, "field 'value' that is not text"),
        ("orca", {"question": "x"}, "missing field 'response'"),
        ("evol", {"output": "x"}, "missing field 'instruction'"),
        ("messages", {"messages": [{"role": "user"}]}, "missing field 'content'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is not text"),
        ("messages", {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "tool call"),
        ("messages", {"messages": [{"role": "user", "content": "", "weight": 2}]}, "weight other than 0 and 1"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ("oasst", {"prompt": node("q", "narrator")}, "unknown role 'narrator'"),
        ("oasst", {"prompt": {"role": "prompter"}}, "missing field 'text'"),
    ],
)
def test_broken_records_are_named(form, record, reason):
    assert reasons(read(form, record)) == [reason]


# ---- what a conversation must be -------------------------------------------------------------------------------------

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no answer to train on"),
        ([U("a")], "no answer to train on"),
        ([U("a"), Message("assistant", "b", False)], "no answer to train on"),
        ([A("a"), U("b")], "begins with the assistant"),
        ([S("s"), A("a")], "begins with the assistant"),
        ([U("a"), U("b"), A("c")], "two user messages in a row"),
        ([U("a"), A("b"), A("c")], "two assistant messages in a row"),
        ([U("a"), S("b"), A("c")], "system message that is not the first"),
        ([S("s"), S("t"), U("a"), A("b")], "system message that is not the first"),
        ([U(" \n"), A("b")], "empty user message"),
        ([U("a"), A("")], "empty assistant message"),
        ([S(""), U("a"), A("b")], "empty system message"),
        ([Message("tool", "x")], "unknown role 'tool'"),
        ([U("a"), A("\ud800")], "text that is not Unicode"),
    ],
)
def test_what_is_unfit(messages, reason):
    with pytest.raises(Unfit, match=reason):
        checked(Conversation(tuple(messages)))


def test_what_comes_after_the_last_trained_answer_is_cut():
    kept = (S("s"), U("a"), A("b"))
    assert checked(Conversation((*kept, U("c")))).messages == kept
    assert checked(Conversation((*kept, U("c"), Message("assistant", "d", False)), "n")).messages == kept
    assert checked(Conversation(kept, "n")) == Conversation(kept, "n")


# ---- where records come from -----------------------------------------------------------------------------------------

ROWS = [{"instruction": "é", "output": "1"}, {"instruction": "b", "output": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.parquet", "folder", "saved"])
def test_every_kind_of_file(write, tmp_path, name):
    content = LINES if ".jsonl" in name else json.dumps(ROWS)
    if name == "d.parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    elif name == "folder":
        (tmp_path / name).mkdir()
        write("folder/b.jsonl", LINES.splitlines()[1])
        write("folder/a.jsonl", LINES.splitlines()[0])
        write("folder/README.md", "not a record")
    else:
        write(name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    source = parse_source(f"evol:{tmp_path / name}")
    assert source.name == "evol"
    expected = [[("user", row["instruction"]), ("assistant", row["output"])] for row in ROWS]
    assert [said(item) for item in source.read()] == expected
    assert [said(item) for item in source.read()] == expected  # read anew each time


def test_the_hub_is_asked_for_a_split(monkeypatch):
    def load_dataset(name, *, split, streaming):
        assert streaming
        return [{"instruction": name, "output": split}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for line, split in (("hf://org/set", "train"), ("hf://org/set:test", "test")):
        (found,) = parse_source(f"mine=evol:{line}").read()
        assert said(found) == [("user", "org/set"), ("assistant", split)]


def test_bad_lines_are_counted(write):
    path = write("d.jsonl", LINES + "{broken\n[1]\n\n")
    items = list(parse_source(f"x=evol:{path}").read())
    assert reasons(items) == ["line that is not JSON", "record that is not an object"]
    assert len(items) == 4
    for form in FORMATS:
        counted = [str(item) for item in parse_source(f"{form}:{path}").read()]
        assert {"line that is not JSON", "record that is not an object"} <= set(counted)


@pytest.mark.parametrize("line", ["d.jsonl", "evol", "evol:", "alpaca:d.jsonl", "x=alpaca:d.jsonl"])
def test_a_source_of_another_form_is_refused(line):
    with pytest.raises(ValueError, match=r"takes \[NAME=\]FORMAT:WHERE, with FORMAT one of oasst, sharegpt"):
        parse_source(line)


def test_files_that_are_not_there_or_not_records(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        parse_source(f"evol:{tmp_path / 'no.jsonl'}")
    with pytest.raises(FileNotFoundError, match=r"holds no .jsonl"):
        parse_source(f"evol:{tmp_path}")
    with pytest.raises(ValueError, match="takes files that end in"):
        parse_source(f"evol:{write('d.csv', 'x')}")
    with pytest.raises(ValueError, match="takes a list of records"):
        list(parse_source(f"evol:{write('d.json', '{}')}").read())
