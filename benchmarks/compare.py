"""Two commits side by side: the same quick set on each, in turns, and the ratios.

    make bench-compare BASE=HEAD~1                    # the working tree against a commit, about two minutes
    python -m benchmarks.compare v0.1.0 --rounds 21 --device cuda

The base is checked out into a temporary worktree of git, and built there when its C++ differs from that of the working
tree. Both are driven by this very file, each in a process of its own that is asked for one call at a time, so that a
machine that slows down slows them both. A ratio above 1 says that the working tree is faster; one that differs from 1
by less than the spread of both, half the range between the quartiles, is shown as noise: on a busy machine even equal
commits differ by more. Each call's result is compared between the two: where they differ by more than rounding there is
no ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = ("*.so", "*.pyd")
TOLERANCE = 0.02
"""Relative difference of what the two commits compute, in bfloat16."""


# ---- the quick set: public functions alone, which every commit has ---------------------------------------------------


def quick_set(device: str) -> dict[str, Callable[[], list]]:
    """Name -> a call, which returns outputs and gradients."""
    import torch
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM

    import lemur_fast as lf

    def both(function: Callable, *inputs: Tensor) -> Callable[[], list]:
        given = [x.to(device) for x in inputs]
        given = [x.bfloat16().requires_grad_() if x.is_floating_point() else x for x in given]
        wanted = [x for x in given if x.is_floating_point()]

        def call() -> list:
            outputs = function(*given)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs])]

        return call

    torch.manual_seed(0)
    tokens, width = (4096, 4096) if device == "cuda" else (1024, 1024)
    x, residual, weight = torch.randn(tokens, width), torch.randn(tokens, width), torch.rand(width) + 0.5
    q, k, v = (torch.randn(tokens, width // 64, 64) for _ in range(3))
    angles = torch.rand(tokens, 32).repeat(1, 2)
    cos, sin = (table.to(device).bfloat16() for table in (angles.cos(), angles.sin()))
    labels = torch.randint(0, 8000, (tokens,))
    documents = [torch.randint(0, 1000, (length,)) for length in (100, 7, 300, 61, 44)]
    cu = torch.tensor([0, 100, 107, tokens // 2, tokens], dtype=torch.int32)
    config = LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).train()
    lf.accelerate(model)
    batch = lf.PackedBatch.from_documents(documents, pad_to=512).to(device)

    def step() -> list:
        model.zero_grad()
        loss = model(**batch.model_inputs()).loss
        loss.backward()
        return [loss, model.get_input_embeddings().weight.grad]

    return {
        "rms_norm": both(lf.ops.rms_norm, x, weight),
        "rms_norm + residual": both(lambda x, w, r: lf.ops.rms_norm(x, w, residual=r), x, weight, residual),
        "rotary": both(lambda q, k: lf.ops.rotary(q, k, cos, sin), q, k),
        "swiglu": both(lf.ops.swiglu, x, residual),
        "attention": both(lf.ops.attention, q, k, v, cu),
        "cross_entropy": both(lf.ops.cross_entropy, torch.randn(tokens, 8000), labels),
        "linear_cross_entropy": both(
            lf.ops.linear_cross_entropy, x[:, :256].contiguous(), torch.randn(8000, 256) / 16, labels
        ),
        "rms_norm, one token": both(lf.ops.rms_norm, x[:1], weight),
        "forward and backward of a small model": step,
    }


def serve(device: str) -> None:
    """A commit's process: for each name that it reads, the seconds of a call, and norms of its results at first."""
    import torch

    calls = quick_set(device)
    print(json.dumps(list(calls)), flush=True)
    told: set[str] = set()
    for line in sys.stdin:
        name = line.strip()
        if name not in told:
            told.add(name)
            results = calls[name]()
            picked = [x.detach().double().flatten()[:: max(1, x.numel() // 64)].tolist() for x in results]
            print(json.dumps(picked), flush=True)
            continue
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        calls[name]()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - start), flush=True)


# ---- the two commits -------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """What git prints; its own words where it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def provide_compiled_part(base: Path) -> str:
    """Puts the compiled part into the base's tree; says how."""
    sources = ("csrc", "cmake", "CMakeLists.txt", "setup.py")
    same = not git("diff", "--name-only", git("-C", str(base), "rev-parse", "HEAD"), "--", *sources)
    built = [path for suffix in SUFFIXES for path in (ROOT / "lemur_fast").glob(f"_C{suffix}")]
    if same and built:
        for path in built:
            shutil.copy2(path, base / "lemur_fast")
        return "its C++ is that of the working tree: the same build serves both"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=base, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"building {base} failed (pip install cmake ninja pybind11 setuptools?):\n{done.stderr[-2000:]}"
        )
    return "its C++ differs, and was built"


class Commit:
    """A commit's process."""

    def __init__(self, tree: Path, folder: Path, device: str) -> None:
        # Only its package, by a link: everything else, this file too, is the working tree's.
        folder.mkdir()
        (folder / "lemur_fast").symlink_to(tree / "lemur_fast")
        # In a cache of its own: what was tuned for the one must not serve the other.
        command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--serve", device]
        environment = os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder), "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.names: list[str] = self._read()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()

    def _read(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a commit's process ended with {self.process.wait()}; its error is above")
        return json.loads(line)

    def ask(self, name: str):
        """The next answer to a name."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()


@contextlib.contextmanager
def running(base: Path, folder: Path, device: str) -> Iterator[list[Commit]]:
    """The processes of the base and of the working tree; none outlives the block, nor the other's failure to start."""
    commits: list[Commit] = []
    try:
        for tree, name in ((base, "b"), (ROOT, "o")):
            commits.append(Commit(tree, folder / name, device))
        yield commits
    finally:
        for each in commits:
            each.end()


def differs(ours: list[list[float]], base: list[list[float]]) -> bool:
    """Whether two commits computed different things."""
    import torch

    for a, b in zip(ours, base, strict=True):
        x, y = torch.tensor(a), torch.tensor(b)
        if not float((x - y).norm()) <= TOLERANCE * max(float(y.norm()), 1e-30):
            return True
    return False


def noise(seconds: list[float]) -> float:
    """Half the range between the quartiles over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle


def measure(base: Commit, ours: Commit, rounds: int) -> list[dict]:
    """A line for each call that both have."""
    lines = []
    for name in [name for name in ours.names if name in base.names]:
        first = {"base": base.ask(name), "ours": ours.ask(name)}
        if differs(first["ours"], first["base"]):
            lines.append({"name": name, "error": "the results differ"})
            continue
        seconds: dict[str, list[float]] = {"base": [], "ours": []}
        for number in range(rounds + 1):  # the first is warm-up
            for which, commit in (("base", base), ("ours", ours))[:: 1 if number % 2 else -1]:
                took = commit.ask(name)
                if number:
                    seconds[which].append(took)
        medians = {which: statistics.median(values) for which, values in seconds.items()}
        ratio = medians["base"] / medians["ours"]
        spread = noise(seconds["base"]) + noise(seconds["ours"])
        lines.append({"name": name, **medians, "ratio": ratio, "noise": spread})
    return lines


def table(lines: list[dict]) -> str:
    """The lines to print."""
    text = [f"{'':<40}{'base, ms':>12}{'this, ms':>12}{'ratio':>9}{'noise':>9}"]
    for line in lines:
        if "error" in line:
            text.append(f"{line['name']:<40}{line['error']:>42}")
            continue
        verdict = "" if abs(line["ratio"] - 1) > line["noise"] else "  noise"
        times = f"{1e3 * line['base']:>12.3f}{1e3 * line['ours']:>12.3f}"
        text.append(f"{line['name']:<40}{times}{line['ratio']:>9.2f}{line['noise']:>8.0%}{verdict}")
    return "\n".join(text)


def main() -> int:
    """Compares; 1 where results differ."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare", description=about, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", nargs="?", help="the commit to compare the working tree with")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default: 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--serve", metavar="DEVICE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    if not arguments.base:
        parser.error("base: a commit is needed, as in `make bench-compare BASE=HEAD~1`")
    if arguments.rounds < 2:
        parser.error(f"--rounds: got {arguments.rounds}; takes 2 or more")
    commit = git("rev-parse", "--verify", f"{arguments.base}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            print(f"base {git('log', '-1', '--format=%h %s', commit)}: {provide_compiled_part(tree)}", flush=True)
            with running(tree, Path(folder), arguments.device) as (base, ours):
                lines = measure(base, ours, arguments.rounds)
        finally:
            git("worktree", "remove", "--force", str(tree))
    print(table(lines))
    return int(any("error" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
