"""Duplicates among conversations, against exact sets of words that Python compares, and hand-written cases."""

import re

import numpy as np
import pytest

from lemur_fast.data.chat import duplicates
from lemur_fast.data.chat.conversation import Conversation, Message
from lemur_fast.data.chat.duplicates import Kept, learned
from lemur_fast.data.pipeline import Settings

NEAR = Settings.near_duplicates
QUESTION = "Please explain to me in simple words why the sky over our heads is blue at noon and red at dusk"
ANSWER = (
    "Air scatters short waves of light more than long ones so blue reaches us from all sides and red comes straight"
)


def talk(*contents, system=None, trained=None):
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    for index in range(1, len(turns), 2):
        turns[index] = Message("assistant", contents[index], trained is None or index in trained)
    return Conversation((*([Message("system", system)] if system else []), *turns))


def dropped(tmp_path, *sources, threshold=NEAR):
    kept = Kept(tmp_path / "kept.arrow")
    ranges = [kept.add(source) for source in sources]
    assert [len(numbers) for numbers in ranges] == list(map(len, sources))
    found = kept.duplicates(threshold)
    assert [kept[number] for number in range(len(kept))] == [each for source in sources for each in source]
    (tmp_path / "kept.arrow").unlink()
    return found


def similarity(one, other):
    sets = []
    for text in (one, other):
        words = re.findall(r"\w+", text)
        sets.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_what_is_dropped_is_what_python_s_sets_say(tmp_path):
    """Families of versions in two sources; a few of the pairs are as near to the threshold as 0.6 and 0.8."""
    rng = np.random.default_rng(1)
    everything, words_of = [], []
    for _ in range(40):
        family = rng.integers(0, 5000, int(rng.integers(30, 200))).astype(str)
        for _ in range(5):
            words = family.copy()
            changed = rng.choice(len(words), int(rng.choice([0, 1, 1, len(words) // 8])), replace=False)
            words[changed] = rng.integers(5000, 10000, len(changed)).astype(str)
            cut = len(words) // 2
            everything.append(talk(" ".join(words[:cut]), " ".join(words[cut:])))
            words_of.append([" ".join(words), " ".join(words[cut:])])
    order = rng.permutation(len(everything))
    everything, words_of = [everything[i] for i in order], [words_of[i] for i in order]
    expected: dict[int, str] = {}
    margin = 1.0
    for later in range(len(everything)):
        if everything[later] in everything[:later]:
            expected[later] = "exact duplicate"
            continue
        for earlier in (number for number in range(later) if number not in expected):
            alike = min(similarity(*pair) for pair in zip(words_of[later], words_of[earlier], strict=True))
            margin = min(margin, abs(alike - NEAR))
            if alike >= NEAR:
                expected[later] = "near duplicate"
                break
    assert margin < 0.03
    assert list(expected.values()).count("near duplicate") > 20
    found = dropped(tmp_path, everything[:77], everything[77:])
    assert found == expected
    assert found == dropped(tmp_path, everything[:77], everything[77:])
    exact = {number for number, why in expected.items() if why == "exact duplicate"}
    assert set(dropped(tmp_path, everything, threshold=0)) == exact


def test_the_first_one_stays(tmp_path):
    one, other = talk(QUESTION, ANSWER), talk(QUESTION + " today", ANSWER)
    assert dropped(tmp_path, [one], [other, one]) == {1: "near duplicate", 2: "exact duplicate"}
    assert dropped(tmp_path, [other, one], [one]) == {1: "near duplicate", 2: "exact duplicate"}
    # Like one that is dropped, and nothing that is kept: stays.
    chain = [talk(" ".join(map(str, range(5 * n, 5 * n + 40))), "Right.") for n in range(3)]
    assert dropped(tmp_path, chain) == {1: "near duplicate"}


def test_several_answers_to_one_long_question_stay(tmp_path):
    answers = ["Because of scattering.", "It is the air. " + ANSWER[40:], ANSWER]
    assert dropped(tmp_path, [talk(" ".join(map(str, range(60))), answer) for answer in answers]) == {}


def test_branches_of_a_tree_and_a_shared_system_message_are_no_duplicates(tmp_path):
    more, less = "And why is it black at night?", "And what colour has it on Mars?"
    long = " ".join(map(str, range(60)))
    first = talk(long, ANSWER, more, "No light comes from there.")
    branch = talk(long, ANSWER, less, "No light comes from there.", trained={3})
    assert similarity(*(" ".join(m.content for m in each.messages) for each in (first, branch))) > 0.7
    assert dropped(tmp_path, [first, branch]) == {}
    assert learned(branch) == f"{less}\nNo light comes from there."
    questions = ["Are two and two more than three, in your opinion?", "Is the moon as far away as the sun is?"]
    assert dropped(tmp_path, [talk(question, "No.", system=long) for question in questions]) == {}
    same = [talk(QUESTION, ANSWER, system=system) for system in ("Be brief.", "Be kind to those who ask.")]
    assert dropped(tmp_path, same) == {1: "near duplicate"}


def test_tiny_conversations_are_dropped_as_exact_copies_only(tmp_path):
    tiny = [
        talk("Hi!", "Hello"),
        talk("Hi", "Hello!"),
        talk("What is C?", "A language"),
        talk("What is C++?", "A language"),
    ]
    assert dropped(tmp_path, tiny) == {}
    assert dropped(tmp_path, tiny, [talk(" Hi! ", "Hello")]) == {4: "exact duplicate"}
    nine, ten = (talk("one two three four five", " ".join("abcde"[:n])) for n in (4, 5))
    for given, near in ((nine, {}), (ten, {1: "near duplicate"})):
        louder = talk("one two three four five!", given.messages[1].content)
        assert dropped(tmp_path, [given, louder]) == near


def test_nothing_and_symbols(tmp_path, monkeypatch):
    assert dropped(tmp_path, []) == {}
    monkeypatch.setattr(duplicates, "MIN_WORDS", 0)
    assert dropped(tmp_path, [talk("?", "!"), talk("??", "!"), talk("one two", "😀"), talk("one two", "😃")]) == {}


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_matter(tmp_path, monkeypatch, chunk):
    given = [talk(f"{QUESTION} {n % 4}", f"{ANSWER} {n % 3}") for n in range(12)]
    expected = dropped(tmp_path, given)
    monkeypatch.setattr(duplicates, "_CHUNK", chunk)
    monkeypatch.setattr(duplicates, "_PAIRS", chunk)
    assert dropped(tmp_path, given) == expected
    assert len(expected) == 11
