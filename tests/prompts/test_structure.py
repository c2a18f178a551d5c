"""Structure of a text: repeated separators, by worked texts and by a loop over characters."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from kvtrim.prompts import encode_context, encode_ends, encode_question, frame
from kvtrim.prompts.document import Document
from kvtrim.prompts.spans import structure


def found(pieces):
    """The pieces of a text, one token each, that are structure; equal pieces are one token."""
    text, places, ids = "".join(pieces), [], []
    for piece in pieces:
        start = places[-1][1] if places else 0
        places.append((start, start + len(piece)))
        ids.append(sorted(set(pieces)).index(piece))
    units = structure(text, ids, places, 0, len(ids))
    assert len(units) == len({ids[unit[0][0]] for unit in units})
    return sorted(at for unit in units for start, end in unit for at in range(start, end))


def by_hand(pieces):
    """The rule, character by character."""

    def word(piece):
        return piece != "" and all(unicodedata.category(c)[0] in ("L", "M", "N") for c in piece)

    text, demoted = "".join(pieces), []
    for at, piece in enumerate(pieces):
        before = text[sum(map(len, pieces[:at])) - 1 :][:1] if at else ""
        after = text[sum(map(len, pieces[: at + 1])) :][:1]
        inside = word(before) and word(after) and not any(c.isspace() for c in piece)
        if pieces.count(piece) >= 4 and not word(piece.strip()) and not inside:
            demoted.append(at)
    return demoted


def at(pieces, *wanted):
    return [number for number, piece in enumerate(pieces) if piece in wanted]


def test_separators_of_a_list_are_structure_and_its_words_and_digits_are_not():
    lines = [piece for n in range(5) for piece in (str(n), ".", " word", "\n")] + ["7"] * 5
    assert found(lines) == at(lines, ".", "\n")


def test_less_than_four_times_is_not_often():
    assert found([".", " a"] * 3 + [","]) == []
    assert found([".", " a"] * 4 + [","]) == [0, 2, 4, 6]


def test_what_stands_glued_inside_a_word_is_no_separator_there():
    pieces = ["8f", "-", "4a", "-", "9e", "\n"] * 4
    assert found(pieces) == at(pieces, "\n")
    assert found(["-", "1", "-", "2", "-", "3", "-"]) == [0, 6]  # no neighbour at the ends
    assert found(["one", ".\n", "two"] * 5) == [1, 4, 7, 10, 13]  # a blank separates


def test_letters_of_any_script_with_their_marks_are_no_structure():
    pieces = ["\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e19\u0e49\u0e33", "\u8a9e", "\u00e9"] * 5
    assert found(pieces) == []
    assert found(["\u3002", "\u8a9e\n"] * 4) == [0, 2, 4, 6]


@given(st.lists(st.sampled_from([*"ab1-.,", " ", "\n", " (", "'s", "-ce", "_", "\u0902"])))
def test_any_text_by_the_loop(pieces):
    assert found(pieces) == by_hand(pieces)


@pytest.mark.parametrize("chat", [True, False])
def test_an_encoded_context_names_its_structure_and_a_question_none(chat):
    tokenizer = models.tokenizer(lines=True)
    around = frame(tokenizer, chat)
    text = "a b\n" * 6
    prompt = encode_context(tokenizer, around, text)
    ((start, end),) = prompt.spans["context"][0]
    places = [at for unit in prompt.spans["structure"] for a, b in unit for at in range(a, b)]
    own = [tokenizer.decode([each]) for each in prompt.context]
    assert places, "no structure, so nothing was proven"
    assert sorted(places) == [n for n in range(start, end) if own[n].strip() == ""]
    assert "structure" not in encode_question(tokenizer, around, text).spans
    cut = encode_ends(tokenizer, around, text, room=len(prompt.context) - 6)
    assert 0 < sum(map(len, cut.spans["structure"])) < len(places)


def test_an_empty_context_has_none_and_a_documents_own_stays():
    tokenizer = models.tokenizer()
    around = frame(tokenizer, False)
    assert encode_context(tokenizer, around, "").spans["structure"] == ()
    own = encode_context(tokenizer, around, Document("a b c d", {"structure": [(0, 2)]}))
    assert len(own.spans["structure"]) == 1
