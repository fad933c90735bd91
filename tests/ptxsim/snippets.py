"""A few lines of PTX as a whole module, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<16>;
    .reg .b32 %r<96>;
    .reg .b64 %d<24>;
    .reg .b32 %thread, %lane, %block;"""
"""Registers of every snippet: predicates, and 16, 32 and 64 bits."""


def entry(
    lines: str | Sequence[str],
    parameters: Mapping[str, str] | None = None,
    name: str = "snippet",
    shared: int = 0,
    directives: str = "",
) -> str:
    """An entry whose parameters are in registers of their names, ``%thread``, ``%lane`` and ``%block`` in theirs.

    Args:
        lines: the statements; a ``ret`` is added.
        parameters: from names to types, ``{"x": "u64"}``; in order.
        name: of the entry.
        shared: bytes of the shared symbol ``sm``, aligned to 1,024.
        directives: what stands before the body.
    """
    parameters = parameters or {}
    text = lines if isinstance(lines, str) else "\n".join(lines)
    declared = ", ".join(f".param .{kind} {name}_{p}" for p, kind in parameters.items())
    loads = "\n".join(
        f"    .reg .b{kind[1:]} %{p};\n    ld.param.{kind} %{p}, [{name}_{p}];" for p, kind in parameters.items()
    )
    symbol = f"    .shared .align 1024 .b8 sm[{shared}];\n" if shared else ""
    return f"""
.visible .entry {name}({declared}) {directives}
{{{REGISTERS}
{symbol}{loads}
    mov.u32 %thread, %tid.x;
    and.b32 %lane, %thread, 31;
    mov.u32 %block, %ctaid.x;
{text}
    ret;
}}
"""


def module(*entries: str, target: str = "sm_90a") -> str:
    """Entries as a module."""
    return f".version 8.4\n.target {target}\n.address_size 64\n" + "".join(entries)


def element(pointer: str, index: str, size: int, register: str) -> list[str]:
    """Sets a 64-bit register to the address of an element."""
    return [f"mul.wide.u32 {register}, {index}, {size};", f"add.s64 {register}, {register}, {pointer};"]
