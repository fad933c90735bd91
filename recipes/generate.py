"""Talk to a chat model, in the terminal.

    python recipes/generate.py                                   # the latest run of recipes/chat.py: a conversation
    python recipes/generate.py runs/chat-tiny-2                  # another run, or any model folder that chat.py wrote
    python recipes/generate.py --prompt "What is a lemur?"       # one answer, and done
    echo "What is a lemur?" | python recipes/generate.py         # the same, from a pipe: every line is a turn
    python recipes/generate.py --system "Answer in one word." --temperature 0

Answers appear as they are written and end at <|im_end|>. In a conversation, /new forgets what was said, /quit or Ctrl-D
leaves, and Ctrl-C cuts an answer short. What is typed is text, whatever it looks like: it never is a control token.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import tyro
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TextStreamer

import lemur_fast as lf
from lemur_fast.data.chat.chatml import DEFAULT_SYSTEM, ChatEncoder
from lemur_fast.data.chat.conversation import Message
from lemur_fast.data.tokenizer import load_tokenizer
from lemur_fast.training.command_line import parse_settings
from lemur_fast.training.distributed import compute_dtype
from lemur_fast.training.weights import check_weights


@dataclass(frozen=True)
class Generate:
    """What to talk to, and how."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run of recipes/chat.py, or of its model. Default: the latest in runs/."""
    prompt: str | None = None
    """Answer this and leave. Default: a conversation."""
    system: str = DEFAULT_SYSTEM
    """The system message."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.6
    """Of sampling; 0 always takes the likeliest token."""
    top_p: float = 0.9
    """Share of the probability that sampling chooses from."""
    seed: int | None = None
    """Makes the answers the same every time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and computation. auto: bfloat16 where it is fast."""


def model_folder(run: Path | None) -> Path:
    """The model of a run, of a folder that is one, or of the latest chat run.

    Raises:
        FileNotFoundError: there is none.
    """
    if run is None:
        runs = [path.parent for path in Path("runs").glob("chat-*/model") if (path / "config.json").is_file()]
        if not runs:
            raise FileNotFoundError("no run of recipes/chat.py in runs/: run that first, or name a folder")
        run = max(runs, key=lambda path: (path / "model").stat().st_mtime)
    for folder in (run / "model", run):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{run} holds no model: neither it nor {run / 'model'} has a config.json")


class Talk:
    """A model, and what was said so far."""

    def __init__(self, args: Generate) -> None:
        folder = model_folder(args.run)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        try:
            self.encoder = ChatEncoder(self.tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{folder} is not a chat model: {error}. recipes/chat.py --model makes one of it"
            ) from None
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA GPU here")
        device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        dtype = compute_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
        check_weights(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        lf.accelerate(self.model)  # norms, rotary embeddings and SwiGLU are fused while decoding, too
        self.args, self.folder = args, folder
        self.stops = sorted({self.encoder.end, self.tokenizer.eos_token_id})
        self.said: list[Message] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.said = [Message("system", self.args.system)]

    def answer(self, question: str) -> str:
        """Write the answer to a question, as it comes, and remember both.

        Raises:
            ValueError: the question is not UTF-8, or alone longer than the model can read.
        """
        question.encode(errors="surrogateescape").decode()  # no tokenizer takes the surrogates of other bytes
        context = self.model.config.max_position_embeddings
        room = min(self.args.max_new_tokens, context // 2)  # for the answer
        system, asked = self.said[0], Message("user", question)
        alone = len(self.encoder.prompt([system, asked]))
        if alone > context - room:
            raise ValueError(
                f"the question has {alone} tokens with its system message; the model reads {context}, of which {room} "
                "are for the answer"
            )
        self.said.append(asked)
        while len(prompt := self.encoder.prompt(self.said)) > context - room:
            print("(the conversation is longer than the model can read: its first question and answer are forgotten)")
            del self.said[1:3]
        ids = torch.from_numpy(prompt)[None].to(self.model.device)
        sampling = {"temperature": self.args.temperature, "top_p": self.args.top_p} if self.args.temperature else {}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=bool(self.args.temperature),
            **(sampling or {"temperature": None, "top_p": None}),
            eos_token_id=self.stops,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        text = str(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()
        self.said.append(Message("assistant", text))
        return text


def converse(talk: Talk) -> None:
    """Ask for questions and answer them, until the input ends."""
    typed = sys.stdin.isatty()
    if typed:
        print(
            f"{talk.folder}, {talk.model.dtype} on {talk.model.device}. /new forgets, /quit leaves, Ctrl-C cuts short."
        )
    while True:
        try:
            question = input("\nyou> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/quit":
            return
        if question == "/new":
            talk.forget()
        elif question:
            try:
                talk.answer(question)
            except KeyboardInterrupt:
                if talk.said[-1].role == "user":  # it got no answer
                    talk.said.pop()
                print(" (cut short)")
            except ValueError as error:
                print(f"generate: {error}")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    args = parse_settings(Generate, argv, description=__doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be above 0, got {args.max_new_tokens}")
        if not 0 < args.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {args.top_p}")
        if not 0 <= args.temperature < math.inf:
            raise ValueError(f"--temperature must not be negative, and finite, got {args.temperature}")
        if args.seed is not None and not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed must be in [0, 2^63), got {args.seed}")
        if args.prompt is not None and not args.prompt.strip():
            raise ValueError("--prompt must not be empty")
        talk = Talk(args)
        if args.seed is not None:
            torch.manual_seed(args.seed)
        if args.prompt is None:
            converse(talk)
        else:
            talk.answer(args.prompt)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
