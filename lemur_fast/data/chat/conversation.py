"""Conversations: what every source format is turned into, and what makes one unfit to train on.

A conversation is an optional system message, then turns of user and assistant in alternation, the user first. Nothing
is mended in silence: what does not have that shape is left out under a reason, and the reasons are counted.
"""

import json
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: str
    content: str
    trained: bool = True
    """Whether an assistant's message is trained on; of no effect on the others, which never are."""


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and where they come from."""

    messages: tuple[Message, ...]
    name: str = ""
    """Where in the source it comes from: an id, or a line."""


class Unfit(ValueError):
    """A record that holds no conversation to train on; its message is a reason that is counted, so it names no id."""


def checked(conversation: Conversation | Unfit) -> Conversation:
    """The conversation, without the turns after its last trained answer: nobody learns from those.

    Raises:
        Unfit: it is none; or it has not the shape above, an empty message, text that is no Unicode, or nothing to train
            on.
    """
    if isinstance(conversation, Unfit):
        raise conversation
    messages = conversation.messages
    for message in messages:
        if message.role not in ROLES:
            raise Unfit(f"unknown role {message.role!r}")
        if not message.content.strip():
            raise Unfit(f"empty {message.role} message")
        try:
            message.content.encode()
        except UnicodeEncodeError:  # a str may hold lone surrogates, which no tokenizer takes
            raise Unfit("text that is not Unicode") from None
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role == "system":
            raise Unfit("system message that is not the first")
        if turn.role != expected:
            raise Unfit("begins with the assistant" if index == 0 else f"two {turn.role} messages in a row")
    last = max((i for i, m in enumerate(messages) if m.role == "assistant" and m.trained), default=None)
    if last is None:
        raise Unfit("no answer to train on")
    return Conversation(messages[: last + 1], conversation.name)


def text(conversation: Conversation) -> str:
    """What is said, by whom, as JSON: equal conversations, and no others, have equal texts.

    Whether a message is trained does not count: two branches of a tree that end alike are not the same conversation,
    and two copies of one are.
    """
    return json.dumps([(message.role, message.content.strip()) for message in conversation.messages])


def opening(conversation: Conversation) -> str:
    """The user's first message: conversations that begin alike must not lie on both sides of a held-out split."""
    return next(message.content.strip() for message in conversation.messages if message.role == "user")
