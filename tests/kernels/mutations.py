"""Mutants of PTX: programs that differ from a compiled kernel in one place, as a wrong compiler or kernel would.

Kinds are listed in `KINDS`; where a kind has very many places, an evenly spaced sample of
them is taken, the same every time. A place that cannot matter by its form alone (an accumulator that is zero anyway) is
none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

KINDS = {
    "barrier deleted": "a bar.sync",
    "copies: wait loosened by one": "cp.async.wait_group N becomes N + 1",
    "copies: wait deleted": "cp.async.wait_group N waits for no group",
    "copies: commit deleted": "a cp.async.commit_group",
    "wgmma: wait loosened by one": "wgmma.wait_group N becomes N + 1",
    "wgmma: wait deleted": "wgmma.wait_group N waits for no group",
    "wgmma: fence deleted": "a wgmma.fence",
    "proxy fence deleted": "a fence.proxy.async",
    "proxy fences all deleted": "every fence.proxy.async at once: one often covers for another",
    "guard removed": "the predicate of an access to global memory, or the size of a copy",
    "mask widened": "lt becomes le, gt becomes ge, and so on, where it guards an access or masks a value: all that "
    "come of one comparison of the source, because each by itself matters only to sizes of one residue",
    "branch widened": "the same where a comparison decides a branch: CUDA C++ has its guards there",
    "factor of an address": "a shift or factor that an address is computed with",
    "offset of an address": "a constant that is added to an address",
    "neighbouring parameter": "a whole number is read from the parameter beside it",
    "sum dropped": "an addition keeps one of its operands",
    "addend dropped": "a fused multiply-add adds 0",
    "accumulator dropped": "a matrix product adds to 0",
    "shuffle": "lanes exchange with others than they should",
    "transposed": "ldmatrix with and without .trans",
    "maximum": "the greater becomes the less",
    "exponent's sign": "2^x becomes 2^-x",
}
"""What each kind of mutant changes."""


@dataclass(frozen=True)
class Mutant:
    """A changed program.

    Attributes:
        kind: a key of `KINDS`.
        number: of the line that is changed, from 1; of the first, where there are several.
        before: that line.
        after: what stands in its place.
        source: ``attention.py:137``, the line that it was compiled from.
        ptx: the whole program.
    """

    kind: str
    number: int
    before: str
    after: str
    source: str
    ptx: str = field(repr=False)


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    guard: str  # "@%p1 " or ""
    opcode: str
    operands: tuple[str, ...]
    place: str  # the .loc before it: where it stands in the source, and in which inlined call
    source: str

    def with_(self, **changes: str) -> str:
        """The line, with the opcode or one operand (``o2=``) changed."""
        operands = list(self.operands)
        for key, value in changes.items():
            if re.fullmatch(r"o\d", key):
                operands[int(key[1])] = value
        guard, opcode = changes.get("guard", self.guard), changes.get("opcode", self.opcode)
        return f"\t{guard}{opcode} {', '.join(operands)};"


_INSTRUCTION = re.compile(r"\s*(@!?%p\d+ )?([a-z][\w.:]*)(?:\s+([^;]*))?;")
_REGISTER = re.compile(r"%(?:p|r|rd|rs|f|fd)\d+")


def _split(text: str) -> tuple[str, ...]:
    return tuple(x.strip() for x in re.split(r",(?![^{\[]*[}\]])", text)) if text else ()


class _Program:
    """The instructions of a module, and where each register is written."""

    def __init__(self, ptx: str) -> None:
        self.lines = ptx.split("\n")
        self.instructions: list[_Line] = []
        self.writers: dict[str, list[_Line]] = {}
        place = source = ""
        files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx))
        for number, text in enumerate(self.lines, 1):
            if m := re.match(r"\s*\.loc\s+\d+ \d+ \d+.*// (\w+\.py:\d+)", text):
                place, source = text.strip(), m[1]
            elif m := re.match(r"\s*\.loc\s+(\d+) (\d+) \d+", text):  # nvcc's, without a comment
                place, source = text.strip(), f"{files.get(m[1], '')}:{m[2]}"
            m = _INSTRUCTION.fullmatch(text)
            if not m or text.lstrip().startswith("."):
                continue
            line = _Line(number, text.strip(), m[1] or "", m[2], _split(m[3] or ""), place, source)
            self.instructions.append(line)
            if line.operands and not line.opcode.startswith(("st.", "cp.", "bar", "bra", "red")):
                for register in _REGISTER.findall(line.operands[0]):
                    self.writers.setdefault(register, []).append(line)
        self.parameters = re.findall(r"\.param \.(\w+) (?:\.ptr[\w .]* )?(\w+)", ptx)
        waits = [x for x in self.instructions if x.opcode.startswith(("cp.async.wait", "cp.async.commit"))]
        self.always_all = {x.operands[0] for x in waits if x.opcode == "cp.async.wait_group"} == {"0"}
        self.last_commits = {
            x.number
            for at, x in enumerate(waits)
            if not any("commit" in after.opcode for after in waits[at + 1 : at + 2])
        }
        self.addresses = self._behind(self._addressed(), ("add", "sub", "shl", "mul", "mad", "or", "xor", "and", "cvt"))
        logic = ("and.pred", "or.pred", "not.pred", "xor.pred", "mov.pred")
        self.guards = self._behind(self._guarding(), logic)
        self.branches = self._behind(self._branching(), logic) - self.guards

    def _addressed(self) -> set[str]:
        """Registers in the brackets of an access."""
        accesses = (
            x for x in self.instructions if re.match(r"(ld|st|cp\.async|ldmatrix|stmatrix|red|atom)\b", x.opcode)
        )
        found: set[str] = set()
        for access in accesses:
            found.update(r for bracket in re.findall(r"\[([^\]]*)\]", access.text) for r in _REGISTER.findall(bracket))
        return found

    def _branching(self) -> set[str]:
        """Predicates that decide a branch."""
        return {r for x in self.instructions if x.opcode.startswith("bra") for r in _REGISTER.findall(x.guard)}

    def _guarding(self) -> set[str]:
        """Predicates that guard an access to global memory, or choose between a value and a constant."""
        found: set[str] = set()
        for x in self.instructions:
            if x.guard and re.match(r"(ld|st)\..*global|cp\.async", x.opcode):
                found.update(_REGISTER.findall(x.guard))
            chooses = x.opcode.startswith("selp.f32") and any(o.startswith("0f") for o in x.operands[1:3])
            if chooses or (x.opcode == "selp.b32" and {"0"} <= set(x.operands[1:3]) <= {"0", "16", "8", "4"}):
                found.add(x.operands[3])
        return found

    def _behind(self, registers: set[str], opcodes: tuple[str, ...]) -> set[str]:
        """The registers, and those that they are computed from by the opcodes alone."""
        reached, left = set(registers), list(registers)
        while left:
            for writer in self.writers.get(left.pop(), []):
                if writer.opcode.startswith(opcodes):
                    new = {r for o in writer.operands[1:] for r in _REGISTER.findall(o)} - reached
                    reached |= new
                    left.extend(new)
        return reached

    def is_zero(self, register: str, before: int) -> bool:
        """Whether a register was last set to 0, going by the order of the lines."""
        earlier = [w for w in self.writers.get(register, []) if w.number < before]
        if not earlier or not earlier[-1].opcode.startswith("mov"):
            return False
        value = earlier[-1].operands[1]
        return bool(re.fullmatch(r"0+|0f0+", value)) or self.is_zero(value, earlier[-1].number)


def _wider(opcode: str) -> str | None:
    """The opcode of a comparison that includes equality, or the reverse."""
    other = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
    m = re.fullmatch(r"setp\.(lt|le|gt|ge)\.([su]\d+)", opcode)
    return f"setp.{other[m[1]]}.{m[2]}" if m else None


def _changes(x: _Line, program: _Program) -> Iterator[tuple[str, str]]:
    """The kinds of change that a line can suffer, and what becomes of it."""
    if x.opcode == "bar.sync":
        yield "barrier deleted", ""
    if x.opcode == "cp.async.wait_group":
        yield "copies: wait loosened by one", x.with_(o0=str(int(x.operands[0]) + 1))
        yield "copies: wait deleted", x.with_(o0="63")
    # Where every wait is for all groups, a commit that another one follows first cannot matter.
    if x.opcode == "cp.async.commit_group" and (not program.always_all or x.number in program.last_commits):
        yield "copies: commit deleted", ""
    if x.opcode == "wgmma.wait_group.sync.aligned":
        yield "wgmma: wait loosened by one", x.with_(o0=str(int(x.operands[0]) + 1))
        yield "wgmma: wait deleted", x.with_(o0="7")
    if x.opcode == "wgmma.fence.sync.aligned":
        yield "wgmma: fence deleted", ""
    if x.opcode.startswith("fence.proxy.async"):
        yield "proxy fence deleted", ""
    if x.guard and re.match(r"(ld|st)\..*global|cp\.async", x.opcode):
        yield "guard removed", x.with_(guard="")
    if re.match(r"cp\.async\.c[ag]", x.opcode) and len(x.operands) == 4 and not x.guard:
        yield "guard removed", x.with_(o3=x.operands[2])
    if (wider := _wider(x.opcode)) and x.operands[0] in program.guards:
        yield "mask widened", x.with_(opcode=wider)
    if wider and x.operands[0] in program.branches:
        yield "branch widened", x.with_(opcode=wider)
    if x.operands and x.operands[0] in program.addresses:
        if re.fullmatch(r"shl\.b(32|64)", x.opcode) and x.operands[2].isdigit():
            yield "factor of an address", x.with_(o2=str(int(x.operands[2]) + 1))
        if re.fullmatch(r"(mul|mad)\.wide\.[su]32", x.opcode) and x.operands[2].isdigit():
            yield "factor of an address", x.with_(o2=str(int(x.operands[2]) * 2))
        if re.fullmatch(r"add\.s(32|64)", x.opcode) and re.fullmatch(r"-?\d+", x.operands[2]):
            yield "offset of an address", x.with_(o2=str(int(x.operands[2]) + 16))
    if re.match(r"(ld|st)\.(global|shared)|ldmatrix", x.opcode) and (m := re.search(r"\+(\d+)\]", x.text)):
        yield "offset of an address", "\t" + x.text.replace(m[0], f"+{int(m[1]) + 16}]")
    if re.fullmatch(r"ld\.param\.[bsu](32|64)", x.opcode):
        names = [name for _, name in program.parameters]
        kinds = [kind for kind, _ in program.parameters]
        at = names.index(x.operands[1].strip("[]"))
        beside = [k for k in (at + 1, at - 1) if 0 <= k < len(names) and kinds[k] == kinds[at]]
        if beside and kinds[at] in ("u32", "s32"):
            yield "neighbouring parameter", x.with_(o1=f"[{names[beside[0]]}]")
    if re.fullmatch(r"add(\.rn)?(\.ftz)?\.f32", x.opcode):
        yield "sum dropped", x.with_(opcode="mov.b32", o2="").replace(", ;", ";")
    if re.fullmatch(r"fma\.rn(\.ftz)?\.f32", x.opcode) and not re.fullmatch(r"0f[08]0+", x.operands[3]):
        yield "addend dropped", x.with_(o3="0f00000000")
    if x.opcode.startswith("mma.sync"):
        into = _REGISTER.findall(x.operands[3])
        if not all(program.is_zero(r, x.number) for r in into):
            yield "accumulator dropped", x.with_(o3=f"{{{', '.join(['0f00000000'] * len(into))}}}")
    if x.opcode.startswith("wgmma.mma_async"):
        at = 3
        keep = x.operands[at]
        if keep not in ("0", "false") and not program.is_zero(keep, x.number):
            yield "accumulator dropped", x.with_(o3="0")
    if x.opcode.startswith("shfl.sync.bfly") and x.operands[2].isdigit():
        lanes = int(x.operands[2])
        yield "shuffle", x.with_(o2=str(lanes // 2 if lanes > 1 else 2 - lanes // 2))
    if x.opcode.startswith("ldmatrix"):
        opcode = (
            x.opcode.replace(".trans", "") if ".trans" in x.opcode else x.opcode.replace(".shared", ".trans.shared")
        )
        yield "transposed", x.with_(opcode=opcode)
    if re.fullmatch(r"max(\.NaN)?(\.ftz)?\.f32", x.opcode):
        yield "maximum", x.with_(opcode=x.opcode.replace("max", "min"))
    if re.match(r"ex2\.approx(\.ftz)?\.f32", x.opcode):
        to, argument = x.operands
        yield (
            "exponent's sign",
            f"\t{{ .reg .b32 %negated; neg.f32 %negated, {argument}; {x.guard}{x.opcode} {to}, %negated; }}",
        )


Place = list[tuple[_Line, str]]
"""Lines that change together, and what becomes of each."""


def _places(program: _Program) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = {kind: [] for kind in KINDS}
    compared: dict[tuple[str, str, str], Place] = {}
    for line in program.instructions:
        for kind, after in _changes(line, program):
            if kind not in ("mask widened", "branch widened"):
                places[kind].append([(line, after)])
            elif (key := (kind, line.place, line.opcode)) in compared:
                compared[key].append((line, after))
            else:
                compared[key] = [(line, after)]
                places[kind].append(compared[key])
    if fences := places["proxy fence deleted"]:
        places["proxy fences all deleted"].append([change for place in fences for change in place])
    return places


def _sample(places: list[Place], most: int) -> list[Place]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(places) <= most:
        return places
    return [places[round(k * (len(places) - 1) / (most - 1))] for k in range(most)]


def mutants(
    ptx: str, most: int = 8, kinds: Callable[[str], bool] = lambda kind: True, all_of: tuple[str, ...] = ()
) -> list[Mutant]:
    """The mutants of a program, in the order of `KINDS`.

    Args:
        ptx: the program.
        most: mutants of a kind; where there are more places, a sample is taken.
        kinds: which kinds are made.
        all_of: kinds of which every place is taken.
    """
    program = _Program(ptx)
    found = []
    for kind, here in _places(program).items():
        if not kinds(kind):
            continue
        for place in here if kind in all_of else _sample(here, most):
            lines = [*program.lines]
            for line, after in place:
                lines[line.number - 1] = after
            first, after = place[0]
            found.append(Mutant(kind, first.number, first.text, after.strip(), first.source, "\n".join(lines)))
    return found
