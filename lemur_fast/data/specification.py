"""Sources as users name them: paths on the command line, or a TOML file.

[[source]]
name = "stack-python"                    # in the manifest
kind = "code"                            # what the mixture weighs
licence = "as each file states"
huggingface = "bigcode/the-stack-dedup"  # or `files`, `jsonl`, `parquet`: a list of paths, folders and globs
data_dir = "data/python"                 # of a Hugging Face dataset: config, split, data_dir, streaming, take
streaming = true
columns = { text = "content", name = "path", licence = "licence" }
languages = ["python"]
"""

import contextlib
import tomllib
from pathlib import Path
from typing import Any

from lemur_fast.data.sources import Columns, Files, HuggingFace, JsonLines, Parquet, Source

_COMMON: dict[str, type] = {"name": str, "kind": str, "origin": str, "licence": str, "languages": list}
_TABLE: dict[str, type] = _COMMON | {"columns": dict}
_READERS: dict[str, dict[str, type]] = {
    "files": _COMMON,
    "jsonl": _TABLE,
    "parquet": _TABLE,
    "huggingface": _TABLE | {"config": str, "split": str, "data_dir": str, "streaming": bool, "take": int},
}


def sources_from_toml(path: str | Path) -> list[Source]:
    """The sources that a TOML file lists; relative paths are taken from its folder.

    Raises:
        ValueError: an entry is incomplete, or has a key or value that nothing takes.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    entries = content.get("source")
    if not isinstance(entries, list) or not entries or set(content) != {"source"}:
        raise ValueError(
            f"{path} must hold [[source]] entries and nothing else; it holds: {', '.join(content) or 'nothing'}"
        )
    return [_source(entry, f"{path}, source {number}", path.parent) for number, entry in enumerate(entries, 1)]


def _source(entry: dict[str, Any], where: str, folder: Path) -> Source:
    readers = [reader for reader in _READERS if reader in entry]
    if len(readers) != 1:
        raise ValueError(f"{where} must say where it is by one of {', '.join(_READERS)}; it says {readers or 'none'}")
    (reader,) = readers
    place = entry[reader]
    takes = _READERS[reader]
    for key, value in entry.items():
        if key == reader:
            continue
        if key not in takes:
            raise ValueError(f"{where}: {key!r} is not something {reader} takes; it takes {', '.join(takes)}")
        if type(value) is not takes[key]:
            raise ValueError(f"{where}: {key} must be a {takes[key].__name__}, got {value!r}")
    if missing := [key for key in ("name", "kind", "licence") if not entry.get(key)]:
        raise ValueError(f"{where} needs {', '.join(missing)}")
    common = {"name": entry["name"], "kind": entry["kind"], "licence": entry["licence"]}
    languages = tuple(str(language).lower() for language in entry.get("languages", ()))
    if reader == "huggingface":
        columns = _columns(entry, where)
        options = {key: entry[key] for key in ("config", "split", "data_dir", "streaming", "take") if key in entry}
        # What is no folder here is a name on the hub.
        found = str(folder / place) if (folder / place).is_dir() else place
        origin = entry.get("origin", f"Hugging Face dataset {place}")
        return HuggingFace(**common, origin=origin, columns=columns, languages=languages, path=found, **options)
    paths = tuple(str(folder / Path(each).expanduser()) for each in ([place] if isinstance(place, str) else place))
    origin = entry.get("origin", ", ".join(paths))
    if reader == "files":
        return Files(**common, origin=origin, paths=paths, languages=languages)
    table = JsonLines if reader == "jsonl" else Parquet
    return table(**common, origin=origin, columns=_columns(entry, where), languages=languages, paths=paths)


def _columns(entry: dict[str, Any], where: str) -> Columns:
    try:
        return Columns(**entry.get("columns", {}))
    except TypeError as error:
        known = ", ".join(vars(Columns()))
        raise ValueError(f"{where}: columns takes {known}; got {', '.join(entry['columns'])}") from error


def source_from_path(path: str, kind: str, licence: str, languages: tuple[str, ...] = ()) -> Source:
    """A source of one kind from a path: a folder, file or glob; `.jsonl` (compressed or not) and `.parquet` are tables
    with a column `text`, or else `content`.
    """
    if not path:
        raise ValueError(f"--{kind}: takes folders, files and globs, got ''")
    plain = [part for part in Path(path).parts if not set(part) & set("*?[")]
    name = (plain[-1].split(".")[0] if plain else "") or kind
    common: dict[str, Any] = {"name": name, "kind": kind, "licence": licence, "origin": path}
    suffixes = Path(path).suffixes
    if not {".jsonl", ".parquet"} & set(suffixes):
        return Files(**common, languages=languages, paths=(path,))
    if languages:
        raise ValueError(
            f"--languages: {path} is a table; a TOML file (--sources) says which of its columns tells them"
        )
    table = JsonLines if ".jsonl" in suffixes else Parquet
    texts, contents = (table(**common, columns=Columns(column), paths=(path,)) for column in ("text", "content"))
    try:
        texts.parts()
    except ValueError as error:
        with contextlib.suppress(ValueError):
            contents.parts()
            return contents
        raise error
    return texts
