"""Makes docs/benchmarks.md, its plots, and the README's headline, of the JSON lines that the benchmarks wrote.

    make bench                                               # runs them all; their lines go to runs/bench
    python -m benchmarks.report                              # runs/bench -> docs/benchmarks.md, docs/benchmarks/*.png
    python -m benchmarks.report --results runs/bench gpu-check   # of two machines: each has a part of its own
    python -m benchmarks.report --readme README.md           # and the headline between the README's two marks

A line is what `benchmarks.harness.write_rows` writes. Lines of one run (machine, threads, versions, commit, time),
benchmark, case, shape, dtype and direction are rivals, and stand in one row of a table: no ratio, table or plot mixes
runs. Where a rival was measured twice in the same case on one machine, the later time counts within a folder; that two
of the results given hold it is an error.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line
from lemur_fast.files import staged_file, write_text

OURS = "lemur_fast"
REQUIRED = ("benchmark", "case", "rival", "median", "error", "machine", "device", "versions", "commit", "time")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

ABOUT = {
    "train_step": ("A training step", "python -m benchmarks.train_step"),
    "attention": ("Attention over packed documents", "python -m benchmarks.attention"),
    "ops": ("Op by op", "python -m benchmarks.ops"),
    "products": ("Linear layers on a CPU", "python -m benchmarks.products"),
    "optimizer": ("The optimizer's step", "python -m benchmarks.optimizer"),
    "scaling": ("How time and memory grow", "python -m benchmarks.scaling"),
    "host_overhead": ("What a call costs the host", "python -m benchmarks.host_overhead"),
    "packing": ("Packing", "python -m benchmarks.packing"),
    "chat": ("Chat tuning", "python -m benchmarks.chat"),
    "dedup": ("Near duplicates", "python -m benchmarks.dedup"),
    "data": ("The data pipeline", "python -m benchmarks.data"),
    "loader": ("The loader", "python -m benchmarks.data"),
    "pretrain": ("Checkpoints and processes", "python -m benchmarks.pretrain"),
}
"""Of the benchmarks, in the order of the report: title and command. Others follow by name."""
BASELINE = {"train_step": "HF sdpa"}
"""Whom the others of a benchmark are compared with; elsewhere the first who is not ours."""
BOUNDS = ("matrix products alone", "bare operator", "no checkpoint")
"""Are no rivals, but what no rival can be faster than: shown, and never the one to compare with."""

Line = dict[str, Any]


@dataclass
class Arguments:
    """Writes the report."""

    results: tuple[Path, ...] = (Path("runs/bench"),)
    """Files of JSON lines, or folders of them; no two may hold the same measurement."""
    out: Path = Path("docs/benchmarks.md")
    """The report; its plots go into a folder of that name beside it."""
    readme: Path | None = None
    """A file with the two marks between which the headline is written."""


# ---- lines -----------------------------------------------------------------------------------------------------------


def read(results: Iterable[Path]) -> list[Line]:
    """Every line of every file, the latest of those of one folder that say the same thing."""
    lines: dict[tuple, Line] = {}
    origin: dict[tuple, tuple[Path, Path]] = {}
    for path in dict.fromkeys(map(Path.resolve, results)):
        files = sorted(path.glob("**/*.jsonl")) if path.is_dir() else [path]
        if not files or not files[0].exists():
            raise SystemExit(f"--results: got {path}, where there are no JSON lines; `make bench` writes runs/bench")
        for file in files:
            for number, text in enumerate(file.read_text().splitlines(), 1):
                line = parsed(text, f"{file}, line {number}")
                key = (*machine_of(line), *group_of(line), line["rival"])
                other, before = origin.setdefault(key, (path, file))
                if other != path:
                    what = ", ".join(filter(None, (line["benchmark"], line["case"], line["shape"], line["rival"])))
                    raise SystemExit(
                        f"--results: {before} and {file} both have {what} on {line['machine']}; give one of them"
                    )
                if key not in lines or lines[key]["time"] <= line["time"]:
                    lines[key] = line
    return list(lines.values())


def parsed(text: str, where: str) -> Line:
    """A line with all its fields; `where` it stands, for what is wrong with it."""
    try:
        line = json.loads(text)
    except ValueError:
        raise SystemExit(f"{where}: is no JSON") from None
    if missing := [name for name in REQUIRED if name not in line]:
        raise SystemExit(f"{where}: lacks {', '.join(missing)}; write_rows writes them")
    if line["error"] and line["median"] is not None:
        raise SystemExit(f"{where}: has a time beside an error; write_rows writes no time for a wrong result")
    return {"shape": "", "direction": "", "dtype": "", "at": {}, "facts": {}} | line


def machine_of(line: Line) -> tuple[str, str]:
    """What lines of one part of the report have in common. A CPU's threads are a benchmark's own."""
    return line["device"], line["machine"].rpartition(", ")[0] or line["machine"]


def run_of(line: Line) -> tuple[str, ...]:
    """What lines must have in common to be compared: all that a time hangs on beside the case itself."""
    names = ("device", "machine", "python", "commit", "time")
    return (*(str(line.get(name, "")) for name in names), json.dumps(line["versions"], sort_keys=True))


def group_of(line: Line) -> tuple[str, ...]:
    """What rivals have in common."""
    names = ("benchmark", "case", "shape", "dtype", "direction")
    return (*(line[name] for name in names), json.dumps(line["at"], sort_keys=True))


def grouped(lines: Iterable[Line], key: Any) -> dict[Any, list[Line]]:
    """By what `key` says, in order."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found


def duration(seconds: float) -> str:
    """With a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:,.0f} {unit}"
    raise AssertionError


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(r) + " |" for r in (headings, ["---"] * len(headings), *rows)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def ours_of(rivals: Iterable[Line]) -> Line | None:
    """The line of ours that others are compared with: plain lemur_fast, or else the fastest of its kinds."""
    ours = [line for line in rivals if line["rival"].startswith(OURS) and line["median"]]
    return min(ours, key=lambda line: (line["rival"] != OURS, line["median"]), default=None)


def peers_of(rivals: Iterable[Line]) -> list[Line]:
    """Those with a time that are neither ours nor a bound."""
    return [r for r in rivals if r["median"] and not r["rival"].startswith(OURS) and r["rival"] not in BOUNDS]


def best_other(rivals: list[Line]) -> str:
    """How many times as fast as the fastest peer ours is."""
    ours, peers = ours_of(rivals), peers_of(rivals)
    return f"{min(peer['median'] for peer in peers) / ours['median']:.2f}" if ours and peers else ""


def spread_of(line: Line) -> str:
    """Half the range over the median, or that there was a single run."""
    return "once" if line.get("spread") is None else f"±{line['spread']:.0%}"


def share_of(line: Line) -> str:
    """Of what, too."""
    if line.get("share_of_copy"):
        return f"{line['share_of_copy']:.0%} of copy"
    return f"{line['share_of_peak']:.0%} of peak" if line.get("share_of_peak") else ""


def counted(rivals: Iterable[Line]) -> str:
    """The bytes and the FLOPs that a case was counted to need."""
    told = []
    for name, unit in (("bytes", "B"), ("flops", "FLOP")):
        amount = max((line.get(name) or 0.0 for line in rivals), default=0.0)
        if amount:
            scale, prefix = next(
                p for p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0, "")) if amount >= p[0]
            )
            told.append(f"{amount / (scale or 1):.3g} {prefix}{unit}")
    return ", ".join(told)


def cell(line: Line | None, ours: Line | None) -> str:
    """Time, spread, share, and how many times as fast as this ours is; or why there is none."""
    if line is None:
        return ""
    if line["median"] is None:
        return "wrong" if line["error"].startswith("wrong") else "-"
    compared = ours is not None and not line["rival"].startswith(OURS)
    ratio = f"x{line['median'] / ours['median']:.2f}" if compared and ours else ""
    return ", ".join(filter(None, (f"{duration(line['median'])} {spread_of(line)}", share_of(line), ratio)))


def wide_table(lines: list[Line]) -> list[str]:
    """A row for each case, a column for each rival that has a time."""
    names = list(dict.fromkeys(line["rival"] for line in lines if line["median"]))
    rows = []
    for rivals in grouped(lines, group_of).values():
        by_name, first, ours = {line["rival"]: line for line in rivals}, rivals[0], ours_of(rivals)
        label = [", ".join(filter(None, (first["case"], first["shape"]))), first["direction"], first["dtype"]]
        cells = (cell(by_name.get(name), ours) for name in names)
        rows.append([*label, counted(rivals), *cells, best_other(rivals)])
    return [
        "x, in a rival's column: how many times as fast as that rival lemur_fast is.",
        "",
        *markdown(["case", "direction", "dtype", "counted", *names, "x the fastest rival"], rows),
    ]


def long_table(lines: list[Line]) -> list[str]:
    """For each case a table with a row for each rival, and all that is known of it."""
    text: list[str] = []
    for rivals in grouped(lines, group_of).values():
        first = rivals[0]
        label = ", ".join(filter(None, (first["case"], first["shape"], first["direction"], first["dtype"])))
        label += f"; counted: {counted(rivals)}" if counted(rivals) else ""
        peers = sorted(peers_of(rivals), key=lambda r: r["rival"] != BASELINE.get(r["benchmark"]))  # stable
        facts = list(dict.fromkeys(n for r in rivals for n, v in r["facts"].items() if isinstance(v, int | float)))
        texts = dict.fromkeys(f"{n}: {v}" for r in rivals for n, v in r["facts"].items() if isinstance(v, str))
        with_memory = any(r.get("peak_bytes") for r in rivals)
        with_share = any(share_of(r) for r in rivals)
        headings = ["", "time", "±", *(f"x {peer['rival']}" for peer in peers)]
        headings += ["share"] * with_share + ["peak GB"] * with_memory
        rows = []
        for r in rivals:
            if r["median"] is None:
                continue
            row = [r["rival"], duration(r["median"]), spread_of(r)]
            row += [f"{peer['median'] / r['median']:.2f}" for peer in peers]
            row += [share_of(r)] * with_share
            row += [f"{r['peak_bytes'] / 1e9:.2f}" if r.get("peak_bytes") else ""] * with_memory
            rows.append([*row, *(_told(r["facts"].get(name)) for name in facts)])
        text += [f"{label}:", "", *markdown([*headings, *(name.replace("_", " ") for name in facts)], rows), ""]
        text += ["x: how many times as fast as the one in the heading the one in the row is.", ""] if peers else []
        text += [f"- {told}" for told in texts] + [""] * bool(texts)
    return text


def facts_table(lines: list[Line]) -> list[str]:
    """A row for each case, with all that is known of it: where nobody has a rival."""
    facts = list(dict.fromkeys(n for r in lines for n, v in r["facts"].items() if isinstance(v, int | float)))
    with_memory = any(r.get("peak_bytes") for r in lines)
    rows = []
    for r in lines:
        if r["median"] is None:
            continue
        label = ", ".join(filter(None, (r["case"], r["shape"], r["direction"], r["dtype"])))
        memory = [f"{r['peak_bytes'] / 1e9:.2f}" if r.get("peak_bytes") else ""] * with_memory
        rows.append(
            [label, duration(r["median"]), spread_of(r), *memory, *(_told(r["facts"].get(name)) for name in facts)]
        )
    headings = ["", "time", "±", *["peak GB"] * with_memory, *(name.replace("_", " ") for name in facts)]
    return markdown(headings, rows)


def _told(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"


def missing(lines: list[Line]) -> list[str]:
    """A line for each reason why rivals have no time, with the cases where it is not all of them."""
    by_reason = grouped((line for line in lines if line["error"]), lambda line: (line["rival"], line["error"]))
    text = []
    for (rival, error), found in by_reason.items():
        cases = list(dict.fromkeys(line["case"] for line in found))
        every = {line["case"] for line in lines}
        where = "" if set(cases) == every else f" ({', '.join(cases)})"
        text.append(f"- {rival}{where}: {error}")
    return text


# ---- growth ----------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Time against one size."""

    case: str
    axis: str
    rival: str
    direction: str
    dtype: str
    sizes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    share: str = ""
    peak_bytes: list[float] = field(default_factory=list)

    @property
    def exponent(self) -> float:
        """Of the power law through the points (least squares of the logarithms): 1 where growth is linear."""
        return statistics.linear_regression([math.log(x) for x in self.sizes], [math.log(y) for y in self.seconds])[0]

    @property
    def last_step(self) -> float:
        """The same of the two largest sizes, where a call's fixed cost counts least."""
        (a, b), (x, y) = self.sizes[-2:], self.seconds[-2:]
        return math.log(y / x) / math.log(b / a)


def curves(lines: Iterable[Line]) -> list[Curve]:
    """Of the lines that lie on one, by size; those of two points and more."""
    found: dict[tuple, Curve] = {}
    on_one = [line for line in lines if len(line["at"]) == 1 and line["median"]]
    names = ("case", "rival", "direction", "dtype")

    def key_of(line: Line) -> tuple[str, ...]:
        case, *rest = (line.get(name, "") for name in names)
        return (case, next(iter(line["at"])), *rest)

    for line in on_one:
        found.setdefault(key_of(line), Curve(*key_of(line)))
    for line in sorted(on_one, key=lambda line: next(iter(line["at"].values()))):
        curve = found[key_of(line)]
        curve.sizes.append(next(iter(line["at"].values())))
        curve.seconds.append(line["median"])
        curve.share = share_of(line)  # in the end that of the largest
        curve.spreads += [] if line.get("spread") is None else [line["spread"]]
        curve.peak_bytes.append(line.get("peak_bytes") or math.nan)
    return [curve for curve in found.values() if len(curve.sizes) > 1]


def growth_table(lines: list[Line]) -> list[str]:
    """A row for each curve: its ends, its exponents, its memory, and how ours compares at the largest size."""
    rows, found = [], curves(lines)
    ours = {(c.case, c.axis, c.direction, c.dtype): c for c in found if c.rival == OURS}
    for c in found:
        sizes = f"{c.axis} {c.sizes[0]:,.0f} to {c.sizes[-1]:,.0f}"
        memory = [b for b in c.peak_bytes if not math.isnan(b)]
        told = f"{memory[0] / 1e6:,.0f} to {memory[-1] / 1e6:,.0f} MB" if memory else ""
        ends = f"{duration(c.seconds[0])} to {duration(c.seconds[-1])}"
        spread = f"±{max(c.spreads):.0%}" if c.spreads else "once"
        mine = ours.get((c.case, c.axis, c.direction, c.dtype))
        known = mine is not None and mine is not c and mine.sizes[-1] == c.sizes[-1]
        ratio = f"{c.seconds[-1] / mine.seconds[-1]:.2f}" if mine and known else ""
        label = [c.case, c.direction, c.dtype, c.rival]
        rows.append([*label, sizes, ends, spread, f"{c.exponent:.2f}", f"{c.last_step:.2f}", told, c.share, ratio])
    headings = ("case", "direction", "dtype", "", "size", "time", "largest ±", "exponent", "exponent of the last step")
    return [
        "Growth as size to the power of the exponent: 1 is linear; below, a call's fixed cost still counts. Share and",
        "x are those at the largest size; x: how many times as fast as the one in the row lemur_fast is.",
        "",
        *markdown([*headings, "peak memory of the call", "share", "x"], rows),
    ]


# ---- plots -----------------------------------------------------------------------------------------------------------


def _colors(names: Iterable[str]) -> dict[str, Any]:
    """Ours in one colour, in every plot, and bounds in grey."""
    from matplotlib import colormaps

    palette, color, others = colormaps["tab10"].colors, {}, 0
    for name in dict.fromkeys(names):
        if name.startswith(OURS):
            color[name] = "#d62728" if name == OURS else "#ff9896"
        elif name in BOUNDS:
            color[name] = "#9e9e9e"
        else:
            others += others % 10 == 3  # tab10's own red
            color[name] = palette[others % 10]
            others += 1
    return color


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staged:
        figure.savefig(staged, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def plot_bars(path: Path, lines: list[Line], title: str, value: str) -> bool:
    """Horizontal bars: for each case those of the rivals; nothing to draw is False.

    Args:
        path: the PNG.
        lines: of one run and benchmark.
        title: above.
        value: "share" of a copy or a matrix product, or "speed" as a multiple of the slowest rival's.
    """
    from matplotlib import pyplot

    share = lambda line: line.get("share_of_copy") or line.get("share_of_peak")  # noqa: E731
    kept = [line for line in lines if line["median"] and (value == "speed" or share(line))]
    if any(line["direction"] == "both" for line in kept):  # a third of the bars tell as much
        kept = [line for line in kept if line["direction"] == "both"]
    groups = {k: v for k, v in grouped(kept, group_of).items() if len(v) > 1}
    if not groups:
        return False
    color = _colors(line["rival"] for line in kept)
    height = sum(len(v) + 1 for v in groups.values())
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.19 * height))
    ticks, labels, at, seen = [], [], 0.0, set()
    for rivals in groups.values():
        slowest = max(line["median"] for line in rivals)
        first = rivals[0]
        ticks.append(at + (len(rivals) - 1) / 2)
        labels.append(", ".join(filter(None, (first["case"], first["shape"], first["direction"], first["dtype"]))))
        for line in rivals:
            width = 100 * share(line) if value == "share" else slowest / line["median"]
            name = line["rival"]
            axes.barh(at, width, 0.9, color=color[name], label=None if name in seen else name)
            seen.add(name)
            axes.text(width, at, f" {width:.0f}%" if value == "share" else f" {width:.1f}x", va="center", fontsize=6)
            at += 1
        at += 1
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("% of a copy, or of a matrix product" if value == "share" else "times as fast as the slowest")
    axes.margins(x=0.08, y=0.01)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)  # beside the bars
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def plot_curves(path: Path, lines: list[Line], title: str) -> bool:
    """Time against each size, on logarithmic axes, a panel for each case; nothing to draw is False."""
    from matplotlib import pyplot, ticker

    found = curves(lines)
    panels = list(dict.fromkeys((c.axis, c.case, c.dtype) for c in found))
    if not panels:
        return False
    color, columns = _colors(c.rival for c in found), 4
    rows = math.ceil(len(panels) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(12, 2.7 * rows), squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        within = [c for c in found if (c.axis, c.case, c.dtype) == panel]
        for c in within:
            label = f"{c.rival}, exponent {c.exponent:.2f}"
            axes.loglog(c.sizes, [1e3 * s for s in c.seconds], "o-", markersize=3, color=color[c.rival], label=label)
        first = min(within, key=lambda c: c.seconds[-1])
        linear = [1e3 * first.seconds[-1] * x / first.sizes[-1] for x in first.sizes]
        axes.loglog(first.sizes, linear, ":", color="grey", linewidth=1, label="linear")
        axes.set_title(", ".join(filter(None, panel[1:])), fontsize=8)
        axes.set_xlabel(panel[0], fontsize=8)
        axes.set_ylabel("ms", fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):  # plain numbers, at the sizes and at powers of ten
            axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xticks(first.sizes, minor=False)
        axes.tick_params(labelsize=7)
        axes.tick_params(axis="x", labelrotation=30)
        axes.legend(fontsize=6)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
    return True


def plot_headline(path: Path, steps: list[Line]) -> bool:
    """Tokens per second of a training step, a panel for each machine and shape; nothing to draw is False."""
    from matplotlib import pyplot

    panels = [[s for s in rivals if s["median"]] for rivals in contests(steps)]
    panels = [rivals for rivals in panels if rivals]
    if not panels:
        return False
    height = 0.8 + 0.32 * max(map(len, panels))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), height), squeeze=False)
    for axes, lines in zip(grid.flat, panels, strict=True):
        color = _colors(line["rival"] for line in lines)
        speeds = [line["facts"]["tokens_per_second"] for line in lines]
        bars = axes.barh([line["rival"] for line in lines], speeds, color=[color[line["rival"]] for line in lines])
        axes.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("tokens/s of a training step; more is better", fontsize=8)
        axes.tick_params(labelsize=8)
        first = lines[0]
        what = ", ".join(filter(None, (first["case"], first["shape"], first["dtype"])))
        axes.set_title(f"{what}\n{first['machine']}, {first['commit']}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


# ---- the report ------------------------------------------------------------------------------------------------------


def measured_on(lines: list[Line]) -> str:
    """Machine, versions, commits and days of some lines, in a sentence."""
    known = lines[0]
    machines = dict.fromkeys(line["machine"] for line in lines)
    packages = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    days = sorted({line["time"][:10] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(machines)}; Python {known['python']}, {packages}; {commits}; {when}."


def contests(steps: list[Line]) -> list[list[Line]]:
    """Lines by what may be compared: one run, case, shape and dtype each."""
    return list(grouped(steps, lambda line: (*run_of(line), *group_of(line))).values())


def section(name: str, lines: list[Line], folder: Path, slug: str) -> list[str]:
    """A benchmark's part: command, and for each run what it was measured on, a table, a plot, and who has no time."""
    title, command = ABOUT.get(name, (name.replace("_", " ").capitalize(), f"python -m benchmarks.{name}"))
    text = [f"### {title}", "", f"`{command}`" + (" `--device cuda`" if lines[0]["device"] == "cuda" else ""), ""]
    for number, here in enumerate(grouped(lines, run_of).values(), 1):
        path = folder / (f"{slug}-{name}.png" if number == 1 else f"{slug}-{name}-{number}.png")
        above = f"{title}\n{here[0]['machine']}, {here[0]['commit']}"
        text += [measured_on(here), ""]
        if curves(here):
            drawn = plot_curves(path, here, above)
            text += growth_table(here)
        elif len(here) > 1 and len(grouped(here, group_of)) == len(here) and {r["rival"] for r in here} == {OURS}:
            drawn = False
            text += facts_table(here)
        elif len(grouped(here, group_of)) <= 2:
            drawn = plot_bars(path, here, above, "speed")
            text += long_table(here)
        else:
            shares = any(share_of(line) for line in here)
            drawn = plot_bars(path, here, above, "share" if shares else "speed")
            text += wide_table(here)
        text += ["", f"![{title}]({folder.name}/{path.name})"] if drawn else []
        reasons = missing(here)
        text += ["", *(["Without a time:", "", *reasons, ""] if reasons else [])]
    return text


def report(lines: list[Line], out: Path) -> str:
    """The text of the report; its plots are written."""
    text = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.report` from the lines that `make bench` and `make gpu-check` leave; nothing",
        "here is typed by hand. Times are medians; ± is half the range of the runs over their median, and `once` says",
        "that there was one run, whose spread is not known. `of copy` is the share of the bandwidth at which torch",
        "copies as many bytes, for ops that are bound by memory; `of peak` that of the rate of a large matrix product,",
        "both measured in the same run (of a training step on a GPU that is known, of its datasheet's rate: the MFU).",
        "`counted` are the bytes that must be moved at least, or the FLOPs that must be computed. Every ratio x is of",
        "times of one run, so of one machine and commit, and more than 1 is faster.",
        f"No rivals, but bounds: {', '.join(BOUNDS)}.",
        "The results of every rival were checked in the same run, and one that was wrong shows no time; not so near",
        "duplicates, whose precision and recall are told, and the data pipeline and checkpoints, which have no rival.",
        "",
    ]
    if not any(line["device"] == "cuda" for line in lines):
        text += ["No GPU has been measured. `make gpu-check` does it, in one command and without a network.", ""]
    slugs: dict[str, int] = {}
    for (device, machine), of_machine in grouped(lines, machine_of).items():
        slug = "".join(c if c.isalnum() else "-" for c in f"{device}-{machine}".lower())
        slug = "-".join(filter(None, slug.split("-")))[:40].rstrip("-")
        slugs[slug] = slugs.get(slug, 0) + 1
        slug += f"-{slugs[slug]}" if slugs[slug] > 1 else ""  # of two long names with one beginning
        text += [f"## {machine}", ""]
        by_benchmark = grouped(of_machine, lambda line: line["benchmark"])
        order = [name for name in ABOUT if name in by_benchmark]
        for name in [*order, *sorted(set(by_benchmark) - set(order))]:
            text += section(name, by_benchmark[name], out.with_suffix(""), slug)
    return "\n".join(text).rstrip() + "\n"


COLUMNS = {"cpu": ("tokens/s", "x HF sdpa", "peak GB"), "cuda": ("tokens/s", "x HF sdpa", "MFU", "peak GB")}
"""Of the headline, by device."""


def headline(lines: list[Line], picture: str) -> str:
    """What stands in the README: a training step, with columns of their own for each machine and shape.

    Those of a GPU are empty until one is measured.
    """
    steps = [line for line in lines if line["benchmark"] == "train_step"]
    if not steps:
        raise SystemExit("--readme: there are no lines of train_step to make the headline of")
    headings, legend, columns = [""], [], []
    for device, name, command in (("cpu", "CPU", "python -m benchmarks.train_step"), ("cuda", "GPU", "make gpu-check")):
        found = contests([step for step in steps if step["device"] == device])
        for number, rivals in enumerate(found or [[]], 1):
            label = f"{name} {number}" if len(found) > 1 else name
            first, *rest = COLUMNS[device]
            headings += [f"{label}: {first}", *rest]
            columns.append((device, {step["rival"]: step for step in rivals}))
            if rivals:
                what = ", ".join(filter(None, (rivals[0]["case"], rivals[0]["shape"], rivals[0]["dtype"])))
                rounds = max(step.get("rounds") or 0 for step in rivals)
                runs = f"; medians of {rounds} steps, ± half their range" if rounds > 1 else ""
                legend += [f"{label} (`{command}`): {what}{runs}. {measured_on(rivals)}", ""]
            elif device == "cuda":
                legend += ["GPU: not measured yet; `make gpu-check` on a machine that has one fills these columns.", ""]
            else:
                legend += [f"CPU: not measured; `{command}` fills these columns.", ""]
    rows = []
    for name in dict.fromkeys(step["rival"] for step in steps if step["median"]):
        cells = [f"**{name}**" if name.startswith(OURS) else name]
        for device, by_name in columns:
            cells += _headline_cells(device, by_name.get(name), by_name.get(BASELINE["train_step"]))
        rows.append(cells)
    about = "x: how many times as fast as HF sdpa, in the same run. Matrix products alone are a bound, and no rival."
    return "\n".join([*markdown(headings, rows), "", about, "", *legend, f"![A training step]({picture})"])


def _headline_cells(device: str, step: Line | None, base: Line | None) -> list[str]:
    """What stands in a rival's columns."""
    if not step or not step["median"]:
        return [""] * len(COLUMNS[device])
    cells = [f"{step['facts']['tokens_per_second']:,.0f} {spread_of(step)}"]
    cells.append(f"{base['median'] / step['median']:.2f}" if base and base["median"] else "")
    if device == "cuda":
        cells.append(f"{step['share_of_peak']:.0%}" if step.get("share_of_peak") else "")
    return [*cells, f"{step['peak_bytes'] / 1e9:.2f}" if step.get("peak_bytes") else ""]


def write_headline(readme: Path, text: str) -> None:
    """Puts it between the two marks."""
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise SystemExit(f"--readme: got {readme}, which must hold {BEGIN} and, after it, {END}, once each")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    write_text(readme, f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(arguments: Arguments) -> None:
    """Reads, draws and writes."""
    import matplotlib

    matplotlib.use("Agg")
    lines = read(arguments.results)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, report(lines, arguments.out))
    print(f"{len(lines)} lines -> {arguments.out}, plots in {arguments.out.with_suffix('')}")
    if arguments.readme:
        picture = arguments.out.with_suffix("") / "headline.png"
        plot_headline(picture, [line for line in lines if line["benchmark"] == "train_step"])
        write_headline(
            arguments.readme, headline(lines, Path(os.path.relpath(picture, arguments.readme.parent)).as_posix())
        )
        print(f"headline -> {arguments.readme}, {picture}")


if __name__ == "__main__":
    main(command_line(Arguments, __doc__))
