"""PTX text to a program: parameters, registers with their widths, shared memory, and a list of statements.

Grammar: PTX ISA 8.8, chapters 4 to 6, as far as compilers emit it. What is not understood raises `Unsupported`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.ptxsim.faults import Unsupported

WIDTHS = {"pred": 1} | {
    f"{kind}{bits}": bits for kind in "bsuf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)
}
"""Bits of a register of each type; a predicate has 1."""


@dataclass(frozen=True)
class Vector:
    """An operand in braces."""

    elements: tuple[str, ...]


@dataclass(frozen=True)
class Address:
    """An operand in brackets: a register or symbol, and an offset in bytes."""

    base: str
    offset: int


Operand = str | Vector | Address


@dataclass(frozen=True)
class Statement:
    """An instruction as it is spelled.

    Attributes:
        opcode: with all its modifiers, ``ld.global.v4.b32``.
        operands: in order.
        guard: the predicate register, or None.
        negated: whether the guard is ``@!``.
        text: as written, for messages.
        source: ``file:line`` of the program it was compiled from, where known.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str
    source: str


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: its name, its type (``u64``) and, for one passed by bytes, its size."""

    name: str
    type: str


@dataclass
class Program:
    """One entry of a PTX module.

    Attributes:
        name: of the entry.
        target: ``sm_80``.
        parameters: in order.
        registers: bits of every register; predicates have 1.
        shared: byte offset of every shared symbol.
        shared_bytes: what the symbols take; dynamic shared memory begins there.
        statements: the instructions.
        labels: index of the statement that follows each label.
        threads: what ``.reqntid`` asks for, or None.
    """

    name: str
    target: str
    parameters: list[Parameter]
    registers: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int
    statements: list[Statement]
    labels: dict[str, int]
    threads: tuple[int, ...] | None


@dataclass
class _Scope:
    """Names declared in braces; an inner one hides an outer one of the same name."""

    number: int
    names: dict[str, str] = field(default_factory=dict)


_IDENTIFIER = r"[%\w$.]+"
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*;")


def parse(ptx: str, entry: str | None = None) -> Program:
    """Reads one entry of a module.

    Args:
        ptx: the module's text.
        entry: the entry's name, or a part of it that no other has; needed where there are several.

    Raises:
        Unsupported: something is spelled in a way that is not known here.
        ValueError: no entry, or several, match `entry`.
    """
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE)}
    text = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.MULTILINE)
    if target is None:
        raise Unsupported("no .target: this is no PTX module")
    entries = [m for m in _ENTRY.finditer(text) if entry is None or entry in m[1]]
    if len(entries) != 1:
        names = ", ".join(m[1] for m in _ENTRY.finditer(text))
        raise ValueError(f"entry: got {entry!r}; takes the name of one of: {names or 'none, there is no entry'}")
    found = entries[0]
    body = text[found.end() : _closing(text, found.end())]
    threads = re.search(r"\.reqntid\s+([\d,\s]+)", found[3])
    shared, shared_bytes = _shared_symbols(text, body)
    parser = _Body(files)
    parser.read(body)
    return Program(
        name=found[1],
        target=target[1],
        parameters=[_parameter(p) for p in found[2].split(",") if p.strip()],
        registers=parser.registers,
        shared=shared,
        shared_bytes=shared_bytes,
        statements=parser.statements,
        labels=parser.labels,
        threads=tuple(int(n) for n in threads[1].split(",")) if threads else None,
    )


def _closing(text: str, start: int) -> int:
    """Where the brace that was opened before `start` is closed."""
    depth = 1
    for m in re.finditer(r"[{}]", text[start:]):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            return start + m.start()
    raise Unsupported("a brace is never closed")


def _parameter(text: str) -> Parameter:
    found = re.fullmatch(r"\s*\.param\s+\.(\w+)((?:\s+\.\w+|\s+\d+)*)\s+([\w$]+)\s*", text)
    if not found or found[1] not in WIDTHS:
        raise Unsupported(f"parameter `{text.strip()}`")
    return Parameter(found[3], found[1])


def _shared_symbols(module: str, body: str) -> tuple[dict[str, int], int]:
    """Static symbols one after the other, then the dynamic one."""
    offsets: dict[str, int] = {}
    end, dynamic, most = 0, None, 128
    outside = module[: module.index(body)]
    inner = 1
    while inner:  # what other entries declare is theirs
        outside, inner = re.subn(r"\{[^{}]*\}", "", outside)
    for m in _SHARED.finditer(outside + body):
        align, kind, name, count = m[1], m[2], m[3], m[4]
        most = max(most, int(align or 0))
        if kind not in WIDTHS:
            raise Unsupported(f"shared symbol `{m[0]}`")
        if count == "":
            if dynamic is not None:
                raise Unsupported("two dynamic shared symbols")
            dynamic = name
            continue
        step = int(align or WIDTHS[kind] // 8)
        offsets[name] = -(-end // step) * step
        end = offsets[name] + int(count or 1) * WIDTHS[kind] // 8
    end = -(-end // most) * most
    if dynamic is not None:
        offsets[dynamic] = end
    return offsets, end


class _Body:
    """Reads the statements between an entry's braces."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.registers: dict[str, int] = {}
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.families: list[tuple[str, int]] = []  # `.reg .b32 %r<118>` declares %r0 to %r117
        self.scopes = [_Scope(0)]
        self.opened = 0
        self.source = ""

    def read(self, body: str) -> None:
        at = 0
        while at < len(body):
            at = self._next(body, at)

    def _next(self, body: str, at: int) -> int:
        """Reads what stands at `at`, and returns where the next thing begins."""
        if m := re.compile(r"\s+").match(body, at):
            return m.end()
        if m := re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*").match(body, at):
            if m[2] != "0":
                self.source = f"{self.files.get(m[1], '?')}:{m[2]}"
            return m.end()
        if m := re.compile(r'\.pragma\s+"[^"]*"\s*;').match(body, at):
            return m.end()
        if m := _SHARED.match(body, at):
            return m.end()  # read before, with those of the module
        if m := re.compile(r"\.reg\s+\.(\w+)\s+([^;]+);").match(body, at):
            self._declare(m[1], m[2])
            return m.end()
        if m := re.compile(r"([\w$]+):(?!:)").match(body, at):
            if m[1] in self.labels:
                raise Unsupported(f"label {m[1]} stands twice")
            self.labels[m[1]] = len(self.statements)
            return m.end()
        if body[at] == "{":
            self.opened += 1
            self.scopes.append(_Scope(self.opened))
            return at + 1
        if body[at] == "}":
            if len(self.scopes) == 1:
                raise Unsupported("a brace is closed that was never opened")
            self.scopes.pop()
            return at + 1
        if m := re.compile(r"[@\w][^;]*;").match(body, at):
            self.statements.append(self._statement(m[0][:-1].strip()))
            return m.end()
        raise Unsupported(f"`{body[at : at + 60].strip()}`")

    def _declare(self, kind: str, names: str) -> None:
        if kind not in WIDTHS:
            raise Unsupported(f"registers of type .{kind}")
        for name in (n.strip() for n in names.split(",")):
            if m := re.fullmatch(r"(%?[\w$]+)<(\d+)>", name):
                self.registers |= {f"{m[1]}{i}": WIDTHS[kind] for i in range(int(m[2]))}
            elif re.fullmatch(r"%?[\w$]+", name):
                unique = name if len(self.scopes) == 1 else f"{name}@{self.scopes[-1].number}"
                self.scopes[-1].names[name] = unique
                self.registers[unique] = WIDTHS[kind]
            else:
                raise Unsupported(f"register `{name}`")

    def _name(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return name

    def _statement(self, text: str) -> Statement:
        text = " ".join(text.split())
        m = re.fullmatch(r"(?:@(!?)(%?[\w$]+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if not m:
            raise Unsupported(f"statement `{text}`")
        guard = self._name(m[2]) if m[2] else None
        operands = tuple(self._operand(x) for x in _split(m[4] or ""))
        return Statement(m[3], operands, guard, m[1] == "!", text, self.source)

    def _operand(self, text: str) -> Operand:
        if m := re.fullmatch(r"\{(.*)\}", text):
            return Vector(tuple(self._name(x.strip()) for x in m[1].split(",")))
        if m := re.fullmatch(rf"\[\s*({_IDENTIFIER})\s*(?:\+\s*(-?\w+)\s*)?\]", text):
            return Address(self._name(m[1]), int(m[2], 0) if m[2] else 0)
        if re.fullmatch(rf"-?{_IDENTIFIER}(\|{_IDENTIFIER})?", text):
            return "|".join(self._name(x) for x in text.split("|"))
        raise Unsupported(f"operand `{text}`")


def _split(text: str) -> list[str]:
    """Splits at the commas that stand outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
