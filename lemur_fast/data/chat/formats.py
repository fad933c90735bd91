"""Formats: from the records of a published data set to conversations.

    oasst      OpenAssistant trees, one a record (`prompt` with nested `replies`), or its flat messages (`parent_id`)
    sharegpt   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    orca       OpenOrca: {"system_prompt": ..., "question": ..., "response": ...}
    evol       Evol-CodeAlpaca: {"instruction": ..., "output": ...}, and `input` where there is one
    messages   {"messages": [{"role": ..., "content": ..., "weight": 0 or 1}, ...]}, as OpenAI has it

Every format is a function from records to conversations, in which an `Unfit` stands where a record holds none, or could
not be read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lemur_fast.data.chat.conversation import Conversation, Message, Unfit, checked

Record = Mapping[str, Any]
Format = Callable[[Iterable[Record | Unfit]], Iterator[Conversation | Unfit]]

_ROLE_OF = {
    **{"system": "system", "user": "user", "assistant": "assistant"},
    **{"human": "user", "prompter": "user"},
    **{"gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"},
}


def _each(convert: Callable[[Record], Conversation]) -> Format:
    """A format in which every record is one conversation."""

    def read(records: Iterable[Record | Unfit]) -> Iterator[Conversation | Unfit]:
        for index, record in enumerate(records):
            if isinstance(record, Unfit):
                yield record
                continue
            try:
                conversation = convert(record)
            except Unfit as unfit:
                yield unfit
                continue
            yield Conversation(conversation.messages, str(record.get("id") or index))

    return read


def _text(record: Record, field: str) -> str:
    value = record.get(field)
    if value is None:
        raise Unfit(f"missing field {field!r}")
    if not isinstance(value, str):
        raise Unfit(f"field {field!r} that is not text")
    return value


def _list(record: Record, field: str) -> list[Any]:
    value = record.get(field)
    if value is None:
        raise Unfit(f"missing field {field!r}")
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise Unfit(f"field {field!r} that is not a list of objects")
    return value


def _role(name: str) -> str:
    return _ROLE_OF.get(name.lower(), name)  # an unknown one is refused, by its name, with the conversation


def _with_system(record: Record, field: str, *messages: Message) -> Conversation:
    """Messages behind the record's system message, which may be missing or empty."""
    system = record.get(field)
    first = (Message("system", system),) if isinstance(system, str) and system.strip() else ()
    return Conversation((*first, *messages))


def _sharegpt(record: Record) -> Conversation:
    turns = [Message(_role(_text(turn, "from")), _text(turn, "value")) for turn in _list(record, "conversations")]
    return _with_system(record, "system", *turns)


def _orca(record: Record) -> Conversation:
    question, response = _text(record, "question"), _text(record, "response")
    return _with_system(record, "system_prompt", Message("user", question), Message("assistant", response))


def _evol(record: Record) -> Conversation:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    given = record.get("input")
    if isinstance(given, str) and given.strip():
        instruction = f"{instruction.rstrip()}\n\n{given}"
    return Conversation((Message("user", instruction), Message("assistant", output)))


def _messages(record: Record) -> Conversation:
    messages = []
    for message in _list(record, "messages"):
        if message.get("tool_calls") or message.get("function_call"):
            raise Unfit("tool call")
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise Unfit("weight other than 0 and 1")
        messages.append(Message(_role(_text(message, "role")), _content(message), trained=weight != 0))
    return Conversation(tuple(messages))


def _content(message: Record) -> str:
    """A message's text: a string, or a list of parts that are all text."""
    content = message.get("content")
    if not isinstance(content, list):
        return _text(message, "content")
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise Unfit("content that is not text")
    return "".join(_text(part, "text") for part in content)


def _oasst(records: Iterable[Record | Unfit]) -> Iterator[Conversation | Unfit]:
    flat: list[Record] = []
    for record in records:
        if isinstance(record, Unfit):
            yield record
        elif isinstance(record.get("prompt"), Mapping):
            yield from _branches(record["prompt"], record.get("tree_state"))
        elif "message_id" in record:
            flat.append(record)
        else:
            yield Unfit("missing field 'prompt'")
    replies: dict[Any, list[Record]] = {}  # of every message; of None: the roots
    for record in flat:
        replies.setdefault(record.get("parent_id"), []).append(record)
    rooted, waiting = set(), list(replies.get(None, ()))
    while waiting:
        message = waiting.pop()
        rooted.add(id(message))
        waiting += replies.get(message["message_id"], ())
    yield from (Unfit("message that no root leads to") for record in flat if id(record) not in rooted)
    for root in replies.get(None, ()):
        yield from _branches(root, root.get("tree_state"), replies)


def _branches(
    root: Record, state: Any, replies: Mapping[Any, list[Record]] | None = None
) -> Iterator[Conversation | Unfit]:
    """Every way from the root of a tree to an answer that is the last, best-ranked replies first.

    Ways share their beginnings. Every answer is trained on once: in each of them, one with many replies would count
    many times.
    """
    if state not in (None, "ready_for_export"):
        yield Unfit(f"tree in state {state!r}")
        return

    def below(node: Record) -> list[Record]:
        found = (node.get("replies") or []) if replies is None else replies.get(node["message_id"], [])
        return sorted(found, key=_rank)

    if not _well_formed(root):
        yield Unfit("replies or ranks of another form")
        return

    def goes_on(node: Record) -> bool:  # to an answer
        return not node.get("deleted") and (node.get("role") != "prompter" or any(map(goes_on, below(node))))

    seen: set[int] = set()  # answers trained on already
    waiting: list[tuple[Record, tuple[Record, ...]]] = [(root, ())]
    while waiting:
        node, above = waiting.pop()
        if node.get("deleted"):
            yield Unfit("deleted message")
            continue
        way = (*above, node)
        next_ones = [reply for reply in below(node) if goes_on(reply) or reply.get("deleted")]
        waiting += [(reply, way) for reply in reversed(next_ones)]
        if any(map(goes_on, next_ones)):
            continue
        try:
            messages = tuple(Message(_role(_text(n, "role")), _text(n, "text"), id(n) not in seen) for n in way)
        except Unfit as unfit:
            yield unfit
            continue
        conversation = Conversation(messages, str(node.get("message_id", "")))
        try:
            checked(conversation)
        except Unfit as unfit:  # its answers are trained on in another way, if there is one
            yield unfit
            continue
        seen.update(map(id, way))
        yield conversation


def _well_formed(root: Record) -> bool:
    """Whether everything below a message is lists of messages, with ranks that are numbers."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Mapping):
            return False
        below = node.get("replies") or []
        if not isinstance(below, list) or not isinstance(node.get("rank"), int | float | None):
            return False
        waiting += below
    return True


def _rank(node: Record) -> float:
    rank = node.get("rank")
    return float("inf") if rank is None else float(rank)


FORMATS: dict[str, Format] = {
    "oasst": _oasst,
    "sharegpt": _each(_sharegpt),
    "orca": _each(_orca),
    "evol": _each(_evol),
    "messages": _each(_messages),
}
