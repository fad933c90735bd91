"""The chat store: a token store whose documents are conversations, and which says what of them is trained on.

    sources ─ shape ─ duplicates ─ split ─ ChatML ─ fitted to the row ─ train/, held_out/, manifest.json

The files are those of `lemur_fast.data.store`, with one more column, `trained`; mixture and loader read it as they read
any other. What became of every conversation is counted in the manifest. While the store is made, the conversations lie
in it a second time, as text.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lemur_fast.data.chat.chatml import ChatEncoder, Encoded, Overlong, fitted
from lemur_fast.data.chat.conversation import Conversation, Unfit, checked, opening
from lemur_fast.data.chat.duplicates import Kept, chunks
from lemur_fast.data.chat.sources import ChatSource
from lemur_fast.data.dedup import text_digest
from lemur_fast.data.pipeline import Settings
from lemur_fast.data.store import SPLITS, Split, TokenStore, token_schema
from lemur_fast.data.tokenizer import fingerprint
from lemur_fast.files import staged_folder

NEAR_DUPLICATES = Settings.near_duplicates
"""Jaccard similarity from which on a conversation is a near duplicate: that of documents."""


def build_chat_store(
    folder: str | Path,
    sources: Sequence[ChatSource],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    overlong: Overlong = "split",
    near_duplicates: float = NEAR_DUPLICATES,
    held_out: float = 0.05,
    tokenizer_notice: str = "",
) -> TokenStore:
    """Read, check, deduplicate, split and tokenize the conversations of `sources` into a new store at `folder`.

    Args:
        folder: the store to make; it appears only when it is whole.
        sources: read one after another; a conversation of an earlier one wins over what is like it in a later one.
        tokenizer: one that `add_chat_tokens` has prepared.
        max_tokens: most tokens of a document, the length of a packed row.
        overlong: what becomes of longer conversations; see `chatml.fitted`.
        near_duplicates: Jaccard similarity of 5-word shingles from which on a conversation is dropped for an earlier
            one, in [0, 1]; 0 keeps all but exact copies. See `duplicates`.
        held_out: share of the conversations to set apart for evaluation, in [0, 1); those with the same first message
            stay together.
        tokenizer_notice: origin and licence of the tokenizer, for the manifest.

    Raises:
        ValueError: a source gives nothing to train on (its reasons are named), two have the same name, or `held_out`
            or `near_duplicates` is out of range.
    """
    if not 0 <= near_duplicates <= 1:
        raise ValueError(f"near_duplicates must be in [0, 1], got {near_duplicates}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"two sources have the same name: {', '.join(names)}; NAME=FORMAT:WHERE gives them their own")
    encoder = ChatEncoder(tokenizer)
    ledger = {source.name: _new_entry(source) for source in sources}
    # A byte says whether a token is trained on: bits could not be read without copying them.
    schema = token_schema(len(tokenizer)).append(pa.field("trained", pa.list_(pa.uint8())))

    with staged_folder(folder) as staging:
        split: Split
        writers = {}
        for split in SPLITS:
            (staging / split).mkdir()
            writers[split] = pa.ipc.new_stream(staging / split / "conversations.arrow", schema)
        kept = Kept(staging / "conversations.arrow")
        numbers = {source.name: kept.add(_fit(source, ledger[source.name])) for source in sources}
        duplicates = kept.duplicates(near_duplicates)
        bar = tqdm(desc="tokenizing", total=len(kept), unit=" conversations", leave=False, disable=None)
        for source in sources:
            entry, here = ledger[source.name], numbers[source.name]
            entry["dropped"].update(duplicates[number] for number in here if number in duplicates)
            bar.update(sum(number in duplicates for number in here))
            for conversations in chunks(kept[number] for number in here if number not in duplicates):
                rows: dict[Split, list[tuple[str, Encoded]]] = {split: [] for split in SPLITS}
                for conversation, encoded in zip(conversations, encoder(conversations), strict=True):
                    pieces = fitted(encoded, max_tokens, overlong)
                    _count_overlong(entry, encoded, pieces)
                    place = int.from_bytes(text_digest(opening(conversation))[:8], "big") / 2**64
                    split = "held_out" if place < held_out else "train"
                    for index, piece in enumerate(pieces):
                        name = conversation.name + (f"#{index + 1}" if len(pieces) > 1 else "")
                        rows[split].append((name, piece))
                        entry[split]["documents"] += 1
                        entry[split]["tokens"] += len(piece)
                        entry[split]["trained"] += int(piece.trained.sum())
                for split, writer in writers.items():
                    count = len(rows[split])
                    columns = {
                        "tokens": [piece.ids for _, piece in rows[split]],
                        "kind": [source.name] * count,
                        "source": [source.name] * count,
                        "name": [name for name, _ in rows[split]],
                        "licence": [source.licence] * count,
                        "trained": [piece.trained.astype(np.uint8) for _, piece in rows[split]],
                    }
                    arrays = [pa.array(columns[field.name], field.type) for field in schema]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                bar.update(len(conversations))
            if not entry["train"]["documents"]:
                found = ", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items())
                raise ValueError(
                    f"source {source.name!r} gives nothing to train on: {entry['conversations']} conversations, "
                    f"dropped: {found or 'none'}; over-long: {entry['overlong']}, held out: {entry['held_out']}"
                )
        bar.close()
        for writer in writers.values():
            writer.close()
        (staging / "conversations.arrow").unlink()
        manifest = {
            "tokenizer": {
                "vocab_size": len(tokenizer),
                "fingerprint": fingerprint(tokenizer),
                "notice": tokenizer_notice,
            },
            "chat": {"max_tokens": max_tokens, "overlong": overlong, "near_duplicates": near_duplicates},
            "held_out": held_out,
            "sources": ledger,
        }
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return TokenStore(folder)


def open_chat_store(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    sources: Sequence[ChatSource] | None,
    settings: Mapping[str, Any],
) -> TokenStore:
    """The store in `folder`, if it is what a run asks for.

    Args:
        folder: made by `build_chat_store`.
        tokenizer: that of the model.
        max_tokens: length of a packed row.
        sources: those it must have been made of; None: whichever.
        settings: values that `build_chat_store` must have been called with, by the names of its arguments.

    Raises:
        ValueError: it is another; the settings of the recipe that say so are named.
    """
    store = TokenStore(folder)
    if "chat" not in store.manifest:
        raise ValueError(f"--data {folder} holds no conversations: it was made for pretraining")
    used, made = store.manifest["tokenizer"], store.manifest["chat"] | {"held_out": store.manifest["held_out"]}
    if used["fingerprint"] != fingerprint(tokenizer):
        raise ValueError(
            f"--data {folder} was tokenized with another tokenizer ({used['notice']}; {used['vocab_size']} tokens) "
            f"than the model's ({len(tokenizer)} tokens)"
        )
    for name, asked in settings.items():
        if asked != made[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {asked}: the conversations in {folder} were prepared with {made[name]}")
    origins = {name: source["origin"] for name, source in store.manifest["sources"].items()}
    if sources is not None and {source.name: source.origin for source in sources} != origins:
        raise ValueError(
            f"--sources: {folder} was made of others ({', '.join(origins)}); resume with those, or start a new run"
        )
    if made["max_tokens"] > max_tokens:
        raise ValueError(f"--data {folder} was made for rows of {made['max_tokens']} tokens, --seq-len is {max_tokens}")
    return store


def _new_entry(source: ChatSource) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": source.name, "origin": source.origin, "licence": source.licence}
    entry |= {"conversations": 0, "dropped": Counter()}
    entry["overlong"] = {"conversations": 0, "pieces": 0, "trained_tokens_lost": 0}
    return entry | {split: {"documents": 0, "tokens": 0, "trained": 0} for split in SPLITS}


def _fit(source: ChatSource, entry: dict[str, Any]) -> Iterator[Conversation]:
    """What is fit to train on; the rest is counted."""
    for item in tqdm(source.read(), f"reading {source.name}", unit=" conversations", leave=False, disable=None):
        entry["conversations"] += 1
        try:
            yield checked(item)
        except Unfit as unfit:
            entry["dropped"][str(unfit)] += 1


def _count_overlong(entry: dict[str, Any], encoded: Encoded, pieces: list[Encoded]) -> None:
    if pieces and pieces[0] is encoded:
        return
    counts = entry["overlong"]
    counts["conversations"] += 1
    counts["pieces"] += len(pieces)
    counts["trained_tokens_lost"] += int(encoded.trained.sum()) - sum(int(piece.trained.sum()) for piece in pieces)
    if not pieces:
        entry["dropped"]["over-long, nothing left"] += 1


def describe(store: TokenStore) -> str:
    """Sources with origin, licence, what is kept, what was dropped and why: a few lines for people."""
    chat = store.manifest["chat"]
    lines = [f"tokenizer  {store.manifest['tokenizer']['notice']}"]
    for name, source in store.manifest["sources"].items():
        train, held_out = (source[split] for split in SPLITS)
        over = source["overlong"]
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source["dropped"].items()) or "none"
        lines += [
            f"data       {name}: {source['origin']}; licence: {source['licence']}",
            f"           {source['conversations']:,} conversations, dropped: {dropped}",
            f"           {train['tokens']:,} tokens to train with, {train['trained']:,} of them trained on "
            f"({train['trained'] / max(1, train['tokens']):.0%}); held out: {held_out['documents']:,} conversations",
        ]
        if over["conversations"]:
            lines.append(
                f"           over-long: {over['conversations']:,} with more than {chat['max_tokens']:,} tokens "
                f"({chat['overlong']}): {over['pieces']:,} pieces, {over['trained_tokens_lost']:,} trained tokens lost"
            )
    return "\n".join(lines)
