"""The manifest: for every source, what came in, what was dropped and why, what was kept."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lemur_fast.data.sources import Source
from lemur_fast.data.store import SPLITS

_NAMED_LICENCES = 20  # the rest is counted together: package data may bring thousands


def corpus_manifest(
    sources: Sequence[Source], hashes: Sequence[str], counts: Sequence[tuple[int, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Add up what the parts counted.

    Args:
        sources: of the corpus.
        hashes: of each source, over the texts of all its documents, kept or not.
        counts: for each part the index of its source, and what was counted.

    Returns:
        For each source by name: kind, origin, licence, hash; documents, bytes and tokens that came in; `dropped`, by
        reason; `train` and `held_out`; `lengths`, `licences` and `languages` of what was kept. Documents that came in
        are those dropped and those kept, to the last one; the same holds for bytes and tokens. Tokens count documents
        that were read, dropped ones too.
    """
    manifest = {}
    for index, (source, digest) in enumerate(zip(sources, hashes, strict=True)):
        mine = [count for number, count in counts if number == index]
        fates: dict[str, Counter[str]] = {}
        for count in mine:
            for fate, of in count["fates"].items():
                fates.setdefault(fate, Counter()).update(of)
        entry: dict[str, Any] = {"kind": source.kind, "origin": source.origin, "licence": source.licence}
        entry["hash"] = f"blake2b:{digest}"
        entry |= {total: sum(count[total] for count in mine) for total in ("documents", "bytes", "tokens")}
        dropped = {fate: dict(of) for fate, of in fates.items() if fate not in SPLITS}
        entry["dropped"] = dict(sorted(dropped.items(), key=lambda item: -item[1]["documents"]))
        for split in SPLITS:
            entry[split] = {"documents": 0, "bytes": 0, "tokens": 0} | dict(fates.get(split, {}))
        for name in ("lengths", "licences", "languages"):
            total: Counter[str] = sum((Counter(count[name]) for count in mine), Counter())
            entry[name] = dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
        entry["lengths"] = {power: entry["lengths"][power] for power in sorted(entry["lengths"], key=int)}
        named = list(entry["licences"].items())
        rest = sum(documents for _, documents in named[_NAMED_LICENCES:])
        entry["licences"] = dict(named[:_NAMED_LICENCES]) | ({"others": rest} if rest else {})
        manifest[source.name] = entry
    return manifest
