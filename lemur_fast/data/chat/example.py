"""A conversation as the model sees it, coloured by what is trained on."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lemur_fast.data.chat.chatml import CHAT_TOKENS, ChatEncoder, Encoded
from lemur_fast.data.chat.conversation import Unfit, checked
from lemur_fast.data.chat.sources import ChatSource

TRAINED, UNTRAINED, CONTROL = "bold green", "dim", "magenta"


def colored(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, marks: bool) -> Text:
    """The text of a conversation's tokens, trained ones in green.

    Args:
        encoded: the conversation.
        tokenizer: the one that gave its tokens.
        marks: also put ⟦ ⟧ around what is trained on, for where there are no colours.
    """
    vocabulary = tokenizer.get_vocab()
    control = {tokenizer.bos_token_id, *(vocabulary[token] for token in CHAT_TOKENS)}
    text = Text()
    ids, trained = encoded.ids.tolist(), encoded.trained.tolist()
    # Runs of text in one state are decoded as one: a character may span several tokens. Control tokens stand alone.
    begin = 0
    for i in range(1, len(ids) + 1):
        if i < len(ids) and trained[i] == trained[begin] and not {ids[i], ids[begin]} & control:
            continue
        style = TRAINED if trained[begin] else UNTRAINED
        opens = marks and trained[begin] and not (begin and trained[begin - 1])
        closes = marks and trained[begin] and (i == len(ids) or not trained[i])
        part = str(tokenizer.decode(ids[begin:i], skip_special_tokens=False))
        text.append("⟦" if opens else "")
        text.append(part, style=f"{style} {CONTROL}" if ids[begin] in control else style)
        text.append("⟧" if closes else "")
        begin = i
    return text


def show(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, title: str, console: Console | None = None) -> None:
    """Print a conversation and a legend; in colours where the terminal has them, with marks where it has not."""
    console = console or Console()
    plain = console.color_system is None
    console.print(f"{title}: {len(encoded)} tokens, {int(encoded.trained.sum())} of them trained on", highlight=False)
    legend = Text("trained on: ⟦like this⟧" if plain else "")
    if not plain:
        legend.append("trained on", style=TRAINED).append(", ").append("not trained on", style=UNTRAINED)
        legend.append(", ").append("control token", style=CONTROL)
    console.print(legend, end="\n\n")
    console.print(colored(encoded, tokenizer, marks=plain), soft_wrap=True)


def show_first(sources: Iterable[ChatSource], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the first conversation of each source."""
    encoder = ChatEncoder(tokenizer)
    for source in sources:
        for item in source.read():
            try:
                conversation = checked(item)
            except Unfit:
                continue
            (encoded,) = encoder([conversation])
            show(encoded, tokenizer, f"\n{source.name}/{conversation.name}")
            break
        else:
            print(f"\n{source.name}: no conversation that could be trained on")
