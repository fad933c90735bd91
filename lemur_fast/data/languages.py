"""Programming languages: told by the name of a file, or by the interpreter that its first line asks for."""

import re
from pathlib import PurePath

_EXTENSIONS = {
    "assembly": ".asm .s",
    "awk": ".awk",
    "c": ".c .h",
    "c#": ".cs",
    "c++": ".cc .cpp .cxx .hh .hpp .hxx .cuh .ino",
    "clojure": ".clj .cljc .cljs",
    "cmake": ".cmake",
    "css": ".css .scss .less",
    "cuda": ".cu",
    "cython": ".pyx .pxd",
    "dart": ".dart",
    "elixir": ".ex .exs",
    "erlang": ".erl .hrl",
    "fortran": ".f .f90 .f95 .f03 .f08",
    "go": ".go",
    "groovy": ".groovy .gradle",
    "haskell": ".hs",
    "html": ".html .htm",
    "java": ".java",
    "javascript": ".js .mjs .cjs .jsx",
    "julia": ".jl",
    "kotlin": ".kt .kts",
    "latex": ".tex .sty",
    "lean": ".lean",
    "lisp": ".lisp .el .scm .rkt",
    "lua": ".lua",
    "matlab": ".m",
    "nim": ".nim",
    "ocaml": ".ml .mli",
    "pascal": ".pas",
    "perl": ".pl .pm",
    "php": ".php",
    "powershell": ".ps1 .psm1",
    "protobuf": ".proto",
    "python": ".py .pyi .pyw",
    "r": ".r",
    "ruby": ".rb .rake",
    "rust": ".rs",
    "scala": ".scala",
    "shell": ".sh .bash .zsh .ksh .fish",
    "sql": ".sql",
    "starlark": ".bzl",
    "swift": ".swift",
    "tcl": ".tcl",
    "terraform": ".tf",
    "typescript": ".ts .tsx",
    "verilog": ".v .sv",
    "vhdl": ".vhd .vhdl",
    "zig": ".zig",
}
_NAMES = {
    "BUILD": "starlark",
    "CMakeLists.txt": "cmake",
    "Dockerfile": "dockerfile",
    "GNUmakefile": "makefile",
    "Makefile": "makefile",
    "Rakefile": "ruby",
    "makefile": "makefile",
}
_INTERPRETERS = {
    **dict.fromkeys(("sh", "bash", "dash", "zsh", "ksh", "fish"), "shell"),
    **{"python": "python", "perl": "perl", "ruby": "ruby", "node": "javascript", "lua": "lua", "php": "php"},
    **{"awk": "awk", "gawk": "awk", "tclsh": "tcl", "Rscript": "r", "julia": "julia", "pwsh": "powershell"},
}
_BY_EXTENSION = {extension: language for language, them in _EXTENSIONS.items() for extension in them.split()}

LANGUAGES = frozenset([*_EXTENSIONS, *_NAMES.values()])
"""Names of all languages that `language_of` tells apart."""

_SHEBANG = re.compile(rb"#![ \t]*(\S+)((?:[ \t]+\S+)*)")


def language_of(name: str, head: bytes = b"") -> str | None:
    """Language of a file, or None.

    Args:
        name: its path; the extension decides, or the whole name (`Makefile`).
        head: how its content begins; a `#!` line decides when the name does not.
    """
    path = PurePath(name)
    known = _NAMES.get(path.name) or _BY_EXTENSION.get(path.suffix.lower())
    if known or not (match := _SHEBANG.match(head)):
        return known
    command, arguments = match[1], match[2].split()
    if command.endswith(b"/env"):  # `#!/usr/bin/env -S python3 -u`: the first word that is no option
        command = next((word for word in arguments if not word.startswith(b"-")), b"")
    interpreter = PurePath(command.decode("ascii", "replace")).name
    return _INTERPRETERS.get(interpreter) or _INTERPRETERS.get(interpreter.rstrip("0123456789."))
