"""What the regular expressions in the table of instructions match: all of it, one by one."""

from __future__ import annotations

import re
from re import _constants as code
from re import _parser as parser

Choice = tuple[int, int]
"""A place in a pattern that may be spelled in several ways, and which of them."""

Way = tuple[str, frozenset[Choice], dict[int, str]]
"""A spelling, the choices that lead to it, and what its groups hold."""


def _sequence(tree: list, known: dict[int, str]) -> list[Way]:
    ways: list[Way] = [("", frozenset(), known)]
    for op, argument in tree:
        ways = [
            (text + more, chosen | further, after)
            for text, chosen, before in ways
            for more, further, after in _ways(op, argument, before)
        ]
    return ways


def _ways(op: object, argument, known: dict[int, str]) -> list[Way]:
    place = id(argument)
    if op is code.LITERAL:
        return [(chr(argument), frozenset(), known)]
    if op is code.IN and all(kind is code.LITERAL for kind, _ in argument):
        return [(chr(c), frozenset({(place, i)}), known) for i, (_, c) in enumerate(argument)]
    if op is code.BRANCH:
        return [
            (text, chosen | {(place, i)}, after)
            for i, branch in enumerate(argument[1])
            for text, chosen, after in _sequence(list(branch), known)
        ]
    if op is code.SUBPATTERN:
        group, _, _, tree = argument
        ways = _sequence(list(tree), known)
        return [(text, chosen, after | {group: text} if group else after) for text, chosen, after in ways]
    if op is code.MAX_REPEAT and argument[:2] == (0, 1):
        taken = _sequence(list(argument[2]), known)
        return [("", frozenset({(place, 0)}), known), *((t, c | {(place, 1)}, after) for t, c, after in taken)]
    if op is code.MAX_REPEAT and argument[0] == 1 and argument[2][0][1] == [(code.CATEGORY, code.CATEGORY_DIGIT)]:
        return [("64", frozenset(), known)]  # one number stands for all
    if op is code.GROUPREF:
        return [(known[argument], frozenset(), known)]
    raise NotImplementedError(f"{op} {argument}")


def spellings(pattern: re.Pattern) -> dict[str, frozenset[Choice]]:
    """Every opcode that a pattern matches, with the choices that lead to it."""
    tree = list(parser.parse(pattern.pattern))
    found = {text: chosen for text, chosen, _ in _sequence(tree, {})}
    assert all(pattern.fullmatch(text) for text in found)
    return found


def untested(pattern: re.Pattern, tested: set[str], most: int = 60) -> set[str]:
    """Opcodes that a test has to be added for.

    All that the pattern matches have to be tested; where those are more than `most`, every choice has to be, not every
    combination of choices.
    """
    every = spellings(pattern)
    if len(every) <= most:
        return set(every) - tested
    covered = frozenset().union(*(chosen for text, chosen in every.items() if text in tested))
    missing = frozenset().union(*every.values()) - covered
    return {next(text for text, chosen in every.items() if choice in chosen) for choice in missing}
