"""The summary of a corpus: one HTML page, self-contained, for those who would rather look than read."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lemur_fast.data.store import SPLITS

_KEPT, _HELD_OUT = "#2f7d6b", "#8cc3ae"
_REASONS = {"near duplicate": "#d9822b", "exact duplicate": "#a85d14"}
_OTHERS = ("#7c6bb0", "#b0576d", "#5b84b1", "#9a8b4f", "#8a8f98", "#c4879b", "#4f6d7a", "#b3a2d6", "#77845c", "#6e5a4b")
_SERIES = ("#2f7d6b", "#5b84b1", "#d9822b", "#7c6bb0", "#b0576d", "#9a8b4f")

_STYLE = """
:root { --ink: #1d2528; --soft: #66737a; --line: #dfe5e6; --page: #f6f8f8; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eeef; --soft: #9aa8ae; --line: #334045; --page: #14191b; --card: #1d2528; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2.5rem 1rem; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: auto; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0 0 .9rem; }
p { margin: .2rem 0; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem; margin: 1.4rem 0; }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .86rem; }
section { margin: 1rem 0; overflow-x: auto; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 1rem; }
.two section { margin: 0; }
.row { display: grid; grid-template-columns: 11rem 1fr 6.5rem; gap: .9rem; align-items: center; margin: .45rem 0; }
.row > :first-child { overflow-wrap: anywhere; }
.row > :last-child { text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 20px; border-radius: 4px; overflow: hidden; background: var(--line); }
.bar i { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: .9rem; color: var(--soft); font-size: .86rem; }
.legend i, td i { display: inline-block; width: .75em; height: .75em; border-radius: 3px; margin-right: .4em; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 500; white-space: nowrap; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td code { overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .86em; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg line { stroke: var(--line); }
"""


def summary_page(manifest: dict[str, Any], similarities: np.ndarray, examples: Sequence[tuple[str, str, float]]) -> str:
    """The page for a manifest.

    Args:
        manifest: of a token store.
        similarities: float [duplicates], of the near duplicates that were dropped.
        examples: of those (dropped, kept, similarity).
    """
    sources = manifest["sources"]
    reasons = sorted({reason for entry in sources.values() for reason in entry["dropped"]})
    others = iter(_OTHERS * (1 + len(reasons) // len(_OTHERS)))
    colours = {reason: _REASONS.get(reason) or next(others) for reason in reasons}
    body = [
        "<h1>The corpus</h1>",
        f"<p>{len(sources)} sources, tokenized with {_text(manifest['tokenizer']['notice'] or 'an unnamed tokenizer')}"
        f" ({manifest['tokenizer']['vocab_size']:,} tokens).</p>",
        _cards(sources),
        _section("What became of every document, by source", _bars(sources, colours, "documents")),
        _section("The same, by tokens", _bars(sources, colours, "tokens")),
        '<div class="two">',
        _section("Length of the documents kept", _lengths(sources)),
        _section("How alike the near duplicates are", _similarities(similarities)),
        "</div>",
        _section("Sources", _source_table(sources)),
        _section("Why documents were dropped", _reason_table(sources, colours)),
    ]
    if languages := _added(entry["languages"] for entry in sources.values() if entry["kind"] != "text"):
        body.append(_section("Programming languages, by tokens kept", _ranking(languages)))
    if examples:
        rows = [
            [f"<code>{_text(gone)}</code>", f"<code>{_text(kept)}</code>", f"{similarity:.2f}"]
            for gone, kept, similarity in examples
        ]
        body.append(
            _section("Some near duplicates", _table(["dropped", "because this is kept", "similarity"], rows, 1))
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The corpus</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value)


def _short(number: float) -> str:
    """Three digits and a unit: 3.14 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _kept(entry: dict[str, Any], of: str) -> int:
    return sum(entry[split][of] for split in SPLITS)


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0) + number
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _cards(sources: dict[str, Any]) -> str:
    entries = list(sources.values())
    met, kept = sum(entry["documents"] for entry in entries), sum(_kept(entry, "documents") for entry in entries)
    near, exact = (
        sum(entry["dropped"].get(reason, {}).get("documents", 0) for entry in entries)
        for reason in ("near duplicate", "exact duplicate")
    )
    cards = [
        (_short(kept), f"documents kept, of {met:,}"),
        (_short(sum(_kept(entry, "tokens") for entry in entries)), "tokens kept"),
        (_short(sum(entry["held_out"]["tokens"] for entry in entries)), "of them held out"),
        (_short(near), "near duplicates"),
        (_short(exact), "exact duplicates"),
    ]
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        tokens = sum(entry["train"]["tokens"] for entry in entries if entry["kind"] == kind)
        cards.append((_short(tokens), f"tokens of {_text(kind)} to train on"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{n}</b><span>{w}</span></div>' for n, w in cards)
        + "</div>"
    )


def _bars(sources: dict[str, Any], colours: dict[str, str], of: str) -> str:
    rows = []
    for name, entry in sources.items():
        pieces = [("to train on", entry["train"][of], _KEPT), ("held out", entry["held_out"][of], _HELD_OUT)]
        pieces += [(reason, count[of], colours[reason]) for reason, count in entry["dropped"].items()]
        total = max(1, entry[of])
        bar = "".join(
            f'<i style="width:{100 * count / total:.3f}%;background:{colour}" title="{_text(what)}: {count:,}"></i>'
            for what, count, colour in pieces
            if count
        )
        rows.append(
            f'<div class="row"><span>{_text(name)}</span><div class="bar">{bar}</div><span>{entry[of]:,}</span></div>'
        )
    legend = {"to train on": _KEPT, "held out": _HELD_OUT} | colours
    marks = "".join(f'<span><i style="background:{colour}"></i>{_text(what)}</span>' for what, colour in legend.items())
    return "".join(rows) + f'<div class="legend">{marks}</div>'


def _columns(
    labels: Sequence[str], series: dict[str, Sequence[int]], axis: str, colour_of: Callable[[int], str]
) -> str:
    """A histogram as SVG: a stack for each label."""
    width, height, left, bottom = 460, 210, 42, 34
    top = max(1, max((sum(values[i] for values in series.values()) for i in range(len(labels))), default=1))
    step = (width - left) / max(1, len(labels))
    parts = []
    for share in (0, 0.5, 1):
        y = (height - bottom) * (1 - share) + 8
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(round(top * share, 1))}</text>')
    every = math.ceil(len(labels) / 9)
    for index, label in enumerate(labels):
        base = height - bottom + 8.0
        for number, (name, values) in enumerate(series.items()):
            tall = values[index] / top * (height - bottom)
            base -= tall
            parts.append(
                f'<rect x="{left + index * step + 1:.1f}" y="{base:.2f}" width="{step - 2:.1f}" height="{tall:.2f}" '
                f'fill="{colour_of(number)}"><title>{_text(name)}, {label}: {values[index]:,}</title></rect>'
            )
        if index % every == 0:
            parts.append(
                f'<text x="{left + (index + 0.5) * step:.1f}" y="{height - 10}" text-anchor="middle">{label}</text>'
            )
    legend = "".join(
        f'<span><i style="background:{colour_of(i)}"></i>{_text(name)}</span>' for i, name in enumerate(series)
    )
    chart = f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
    return f'{chart}<p style="font-size:.86rem">{axis}</p><div class="legend">{legend}</div>'


def _lengths(sources: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(entry["kind"] for entry in sources.values()))
    found = {kind: _added(entry["lengths"] for entry in sources.values() if entry["kind"] == kind) for kind in kinds}
    powers = [int(power) for counts in found.values() for power in counts]
    span = range(min(powers, default=0), max(powers, default=0) + 1)
    labels = [_binary(2**power) for power in span]
    series: dict[str, Sequence[int]] = {kind: [found[kind].get(str(power), 0) for power in span] for kind in kinds}
    axis = "Tokens of a document, from the figure to its double; documents."
    return _columns(labels, series, axis, lambda number: _SERIES[number % len(_SERIES)])


def _binary(number: int) -> str:
    for size, unit in ((2**20, "Mi"), (2**10, "Ki")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def _similarities(similarities: np.ndarray) -> str:
    if not len(similarities):
        return "<p>None were found.</p>"
    low = math.floor(float(similarities.min()) * 20) / 20
    edges = np.arange(low, 1.0001, 0.05)
    counts, _ = np.histogram(np.minimum(similarities, 0.99999), np.append(edges, 1.05) if len(edges) == 1 else edges)
    labels = [f"{edge:.2f}" for edge in edges[: len(counts)]]
    axis = "Jaccard similarity of the 5-word shingles to the document that is kept."
    return _columns(labels, {"near duplicates": counts.tolist()}, axis, lambda _: _REASONS["near duplicate"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """A table, the last `numbers` columns of which are numbers."""
    firsts = len(head) - numbers
    top = "".join(f'<th class="{"n" if i >= firsts else ""}">{cell}</th>' for i, cell in enumerate(head))
    lines = [
        "<tr>"
        + "".join(f'<td class="{"n" if i >= firsts else ""}">{cell}</td>' for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _source_table(sources: dict[str, Any]) -> str:
    head = ["source", "kind", "origin", "licence", "documents in", "tokens in", "tokens kept", "held out"]
    rows = [
        [
            f'<b>{_text(name)}</b><br><code title="{entry["hash"]}">{entry["hash"].partition(":")[2][:12]}</code>',
            _text(entry["kind"]),
            _text(entry["origin"]),
            _text(entry["licence"]),
            *(f"{number:,}" for number in (entry["documents"], entry["tokens"], _kept(entry, "tokens"))),
            f"{entry['held_out']['tokens']:,}",
        ]
        for name, entry in sources.items()
    ]
    return _table(head, rows, 4)


def _reason_table(sources: dict[str, Any], colours: dict[str, str]) -> str:
    rows = [
        [
            f'<i style="background:{colours[reason]}"></i>{_text(reason)}',
            _text(name),
            f"{count['documents']:,}",
            f"{count['tokens']:,}",
            f"{count['documents'] / max(1, entry['documents']):.1%}",
        ]
        for name, entry in sources.items()
        for reason, count in entry["dropped"].items()
    ]
    head = ["reason", "source", "documents", "tokens", "of the source"]
    return _table(head, rows, 3) if rows else "<p>None were.</p>"


def _ranking(counts: dict[str, int]) -> str:
    total, rows = max(1, sum(counts.values())), []
    for name, count in list(counts.items())[:12]:
        bar = f'<div class="bar"><i style="width:{100 * count / total:.2f}%;background:{_KEPT}"></i></div>'
        rows.append(f'<div class="row"><span>{_text(name or "not told")}</span>{bar}<span>{_short(count)}</span></div>')
    return "".join(rows)
