r"""ChatML as Lemur has it: from a conversation to token ids, and which of them are trained on.

    <s><|im_start|>system\n{content}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n...

`<s>` stands once in front, where the tokenizer has a beginning of its own. Contents are stripped; a conversation
without a system message gets `DEFAULT_SYSTEM`. Trained on are an answer's content and its ``<|im_end|>\n``, nothing
else.

A conversation is tokenized once, a message at a time. What is typed into a message can not become a control token: text
and control tokens never meet in one string. `TEMPLATE` gives the same ids to whoever uses `apply_chat_template`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lemur_fast.data.chat.conversation import ROLES, Conversation, Message

Overlong = Literal["split", "truncate", "drop"]
OVERLONG: tuple[Overlong, ...] = ("split", "truncate", "drop")

PAD, START, END, SEPARATOR, DIFF_MARKER = "<pad>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|diff_marker|>"
CHAT_TOKENS = (PAD, START, END, SEPARATOR, DIFF_MARKER)
DEFAULT_SYSTEM = "You are a helpful, respectful, and honest assistant."

# The marks of generation tell `apply_chat_template(..., return_assistant_tokens_mask=True)` what is trained on.
TEMPLATE = """\
{{- BOS }}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("unknown role '" + message.role + "'; takes system, user, assistant") }}
    {%- endif %}
    {%- if message.content is not string %}
        {{- raise_exception('content that is not a string') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content.strip() + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content.strip() + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def add_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make a tokenizer speak ChatML, in place: append the control tokens that it lacks, set padding and the template.

    Returns:
        The ids that were appended: 32000 to 32004 for a tokenizer of 32,000 pieces, fewer where some were there.

    Raises:
        ValueError: the tokenizer cannot give the ids that training needs, such as one whose `<|im_end|>` is ordinary
            text, or eats the line's end behind it.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    tokenizer.pad_token = PAD
    tokenizer.chat_template = TEMPLATE.replace("BOS", "bos_token" if _has_own_bos(tokenizer) else "''").replace(
        "DEFAULT", repr(DEFAULT_SYSTEM)
    )
    check_template(tokenizer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in missing)


def _has_own_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation begins with bos; SmolLM2's is `<|im_start|>` itself."""
    return tokenizer.bos_token is not None and tokenizer.bos_token not in CHAT_TOKENS


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray
    """[T] int32."""
    trained: np.ndarray
    """[T] bool: the tokens that the model learns to give."""
    turns: tuple[int, ...]
    """Where the user's and the assistant's messages begin, and at last T. What is before the first is the head: bos and
    the system message."""

    def __len__(self) -> int:
        return len(self.ids)


class ChatEncoder:
    """Turns conversations into tokens; holds what is the same for all of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use a tokenizer that `add_chat_tokens` has made speak ChatML.

        Raises:
            ValueError: it does not, or it makes control tokens of text.
        """
        vocabulary = tokenizer.get_vocab()
        lacking = [token for token in (START, END) if token not in vocabulary]
        if lacking:
            raise ValueError(f"the tokenizer has no {', '.join(lacking)}: add_chat_tokens has not been called")
        self.tokenizer = tokenizer
        self.start, self.end = vocabulary[START], vocabulary[END]
        self.bos = [tokenizer.bos_token_id] if _has_own_bos(tokenizer) else []
        # What the tokenizer makes of a header and of the line's end is the same everywhere: nothing merges with it.
        *headers, self.after = self._texts([*(f"{role}\n" for role in ROLES), "\n"])
        self.headers: dict[str, list[int]] = dict(zip(ROLES, headers, strict=True))
        control = [*CHAT_TOKENS, *sorted(set(tokenizer.all_special_tokens) - set(CHAT_TOKENS))]
        spelled = self._texts([f"{token}{token} {token}\n" for token in control])
        for token, ids in zip(control, spelled, strict=True):
            if vocabulary.get(token) in ids:
                raise ValueError(
                    f"this tokenizer makes the control token {token} of text that only mentions it: there it is no "
                    "special token, so whoever types it could end a turn"
                )

    def _texts(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that lie between control tokens; no text gives a control token, whatever is typed into it."""
        encodings = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return encodings["input_ids"]

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Tokens of conversations, in one call of the tokenizer, on all cores.

        Raises:
            ValueError: the tokenizer joins a header with the content behind it.
        """
        all_messages = [_with_system(conversation) for conversation in conversations]
        texts = [f"{m.role}\n{m.content.strip()}" for messages in all_messages for m in messages]
        ids = iter(self._texts(texts) if texts else [])
        encoded = []
        for messages in all_messages:
            row, trained, turns = list(self.bos), [False] * len(self.bos), []
            for message in messages:
                if message.role != "system":
                    turns.append(len(row))
                text, header = next(ids), self.headers[message.role]
                if text[: len(header)] != header:
                    raise ValueError(
                        f"this tokenizer joins the header {message.role!r} with the content behind it: a prompt would "
                        f"not be the beginning of what was trained on. Content: {message.content[:40]!r}"
                    )
                row += [self.start, *text, self.end, *self.after]
                answer = message.role == "assistant" and message.trained
                before = 1 + len(header)
                trained += [False] * before + [answer] * (1 + len(text) + 1 + len(self.after) - before)
            encoded.append(Encoded(np.array(row, np.int32), np.array(trained, bool), (*turns, len(row))))
        return encoded

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """[T] int64 ids of a conversation that the model is to continue: it ends in the assistant's header."""
        (encoded,) = self([Conversation(tuple(messages))])
        return np.array([*encoded.ids, self.start, *self.headers["assistant"]], np.int64)


def _with_system(conversation: Conversation) -> tuple[Message, ...]:
    messages = conversation.messages
    if messages and messages[0].role == "system":
        return messages
    return (Message("system", DEFAULT_SYSTEM), *messages)


def fitted(encoded: Encoded, max_tokens: int, overlong: Overlong) -> list[Encoded]:
    """The pieces of a conversation that are trained on when none may have more than `max_tokens` tokens.

    A piece is the head and whole exchanges (a user's message and its answer): cuts fall before a user's message only.

    Args:
        encoded: a conversation.
        max_tokens: most tokens of a piece.
        overlong: what becomes of longer ones. ``split``: into as few pieces as going from front to back gives; an
            exchange that is too long even alone is left out. ``truncate``: the first piece, up to the first exchange
            that does not fit. ``drop``: nothing stays.

    Returns:
        The pieces that have something to train on, in order; the conversation itself if it fits.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong: got {overlong!r}; takes {', '.join(OVERLONG)}")
    if len(encoded) <= max_tokens:
        return [encoded]
    if overlong == "drop":
        return []
    head = encoded.turns[0]
    bounds = [*encoded.turns[:-1:2], len(encoded)]  # of the exchanges
    spans: list[tuple[int, int]] = []
    begin = bounds[0]
    for start, end in itertools.pairwise(bounds):
        if head + end - begin <= max_tokens:
            continue
        if overlong == "truncate":
            spans.append((begin, start))
            break
        spans.append((begin, start))
        begin = start if head + end - start <= max_tokens else end
    else:
        spans.append((begin, len(encoded)))
    pieces = []
    for start, end in spans:
        part = np.r_[0:head, start:end]
        turns = tuple(turn - start + head for turn in encoded.turns if start <= turn < end)
        piece = Encoded(encoded.ids[part], encoded.trained[part], (*turns, len(part)))
        if piece.trained.any():
            pieces.append(piece)
    return pieces


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How Lemur-Chat is served: it stops at the end of a turn, and at that of a document."""
    end = tokenizer.convert_tokens_to_ids(END)
    return GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, end}),
        pad_token_id=tokenizer.pad_token_id,
    )


def template_mask(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids and trained tokens as the tokenizer's own chat template has them.

    Raises:
        ValueError: the template has no generation marks, so that it cannot say what is trained on.
    """
    template = tokenizer.get_chat_template()
    if "generation %}" not in template or "endgeneration" not in template:
        raise ValueError(
            "the chat template has no {% generation %} marks around what the assistant says, so it cannot say what is "
            "trained on; add_chat_tokens sets one that has"
        )
    plain = [{"role": message.role, "content": message.content} for message in messages]
    output: Any = tokenizer.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    return list(output["input_ids"]), [bool(value) for value in output["assistant_masks"]]


_PROBE = (Message("user", "What is 1 + 1?\n\n  é 😀"), Message("assistant", "2.\nTwo"), Message("user", "Thanks"))


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a tokenizer's template gives the ids and the trained tokens that training uses.

    Raises:
        ValueError: it does not.
    """
    (encoded,) = ChatEncoder(tokenizer)([Conversation(_PROBE)])
    ids, trained = template_mask(tokenizer, _PROBE)
    if ids != encoded.ids.tolist() or trained != encoded.trained.tolist():
        raise ValueError(
            "the tokenizer's chat template gives other ids than its text between control tokens does; training it "
            f"would not fit its use. Template: {tokenizer.convert_ids_to_tokens(ids)}; between control tokens: "
            f"{tokenizer.convert_ids_to_tokens(encoded.ids.tolist())}"
        )
