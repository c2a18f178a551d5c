"""From a document with named parts to the same parts in tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.prompts import Frame, encode_context, encode_ends, encode_question
from kvtrim.prompts.document import Document

AROUND = Frame("<s>[", "]\n\n", "!")


def texts(document, name):
    """The text of each unit, its ranges joined."""
    return ["|".join(document.text[a:b] for a, b in unit) for unit in document.parts()[name]]


def decoded(tokenizer, ids, spans, name):
    """The same, from tokens."""
    return ["|".join(tokenizer.decode(ids[a:b]) for a, b in unit) for unit in spans[name]]


def merging(*merges):
    """A byte tokenizer that joins these pairs into one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    raw = Tokenizer(BPE(vocabulary, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_a_document_is_split_at_a_separator_that_belongs_to_the_part_before():
    document = kvtrim.Document.split("Q: 1\nA: 2\n###\nQ: 3\nA: 4\n###\nQ: 5", "\n###\n")
    assert texts(document, "shots") == ["Q: 1\nA: 2\n###\n", "Q: 3\nA: 4\n###\n", "Q: 5"]
    empty = kvtrim.Document.split("## one ## two ##  ## ", "##")
    assert texts(empty, "shots") == ["## one ##", " two ##  ## "]
    with pytest.raises(UsageError, match="'##' does not occur"):
        kvtrim.Document.split("one", "##")
    with pytest.raises(UsageError, match="does not occur"):
        kvtrim.Document.split("one", "")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two? Three!", ["One. ", "Two? ", "Three!"]),
        ('He said "no." She\nleft.  \n\n So?', ['He said "no." ', "She\n", "left.  \n\n ", "So?"]),
        ("3.14 is pi... isn't it", ["3.14 is pi... ", "isn't it"]),
        ("\n\n  first line\nsecond", ["\n\n  first line\n", "second"]),
        ("\u4e00\u3002\u4e8c\uff1f", ["\u4e00\u3002", "\u4e8c\uff1f"]),
        ("no end", ["no end"]),
        ("", []),
        ("  \n ", []),
    ],
)  # fmt: skip
def test_sentences(text, sentences):
    assert texts(kvtrim.Document(text), "sentences") == sentences


@settings(max_examples=100, deadline=None)
@given(st.text("ab.? \n!\"'", max_size=40))
def test_sentences_cover_the_text(text):
    found = texts(kvtrim.Document(text), "sentences")
    assert "".join(found) == (text if text.strip() else "")
    assert all(piece.strip() for piece in found)


def test_blanks_belong_to_the_unit_before_them():
    document = kvtrim.Document(
        "rule: one \n two\n\nrest ", {"shots": [(6, 9), [(12, 15), (17, 21)]]}
    )
    assert texts(document, "shots") == ["one \n ", "two\n\n|rest "]
    near = kvtrim.Document("one  two", {"shots": [(0, 3), (4, 8)]})
    assert texts(near, "shots") == ["one ", " two"]


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="beyond the 3 characters"):
        kvtrim.Document("abc", {"shots": [(0, 4)]})
    with pytest.raises(UsageError, match="overlap"):
        kvtrim.Document("abcdef", {"shots": [(0, 4), (3, 5)]})
    with pytest.raises(UsageError, match="a document is text, got list"):
        kvtrim.Document(["abc"])


def encode_all(tokenizer, context, question):
    asked = encode_question(tokenizer, AROUND, question)
    return encode_context(tokenizer, AROUND, context).with_question(asked)


def test_every_part_of_a_prompt_has_its_tokens():
    tokenizer = models.tokenizer()
    document = kvtrim.Document.split("ab\u00e9. c ## d\U0001f600 ## e", "##")
    prompt = encode_all(tokenizer, document, "Why?")
    ids = prompt.ids
    assert decoded(tokenizer, ids, prompt.spans, "system") == ["<s>["]
    assert decoded(tokenizer, ids, prompt.spans, "context") == [document.text]
    assert decoded(tokenizer, ids, prompt.spans, "question") == ["Why?"]
    for name in ("shots", "sentences"):
        assert decoded(tokenizer, ids, prompt.spans, name) == texts(document, name)
    assert (
        prompt.ids
        == tokenizer(f"<s>[{document.text}]\n\nWhy?!", add_special_tokens=False).input_ids
    )


def test_a_token_across_a_boundary_belongs_to_the_part_before():
    tokenizer = merging(("b", "c"))
    document = kvtrim.Document("abcd", {"shots": [(0, 2), (2, 4)]})
    prompt = encode_context(tokenizer, Frame("", "", ""), document)
    assert decoded(tokenizer, prompt.ids, prompt.spans, "shots") == ["abc", "d"]
    inside = kvtrim.Document("abcd", {"shots": [(2, 4)]})
    prompt = encode_context(tokenizer, Frame("", "", ""), inside)
    assert decoded(tokenizer, prompt.ids, prompt.spans, "shots") == ["d"]
    swallowed = kvtrim.Document("abcd", {"shots": [(0, 2), (2, 3), (3, 4)]})
    prompt = encode_context(tokenizer, Frame("", "", ""), swallowed)
    assert decoded(tokenizer, prompt.ids, prompt.spans, "shots") == ["abc", "d"]
    template = encode_context(merging(("[", "a")), Frame("[", "", ""), "abc")
    assert template.spans["system"] == (((0, 1),),)
    assert template.spans["context"] == (((1, 3),),)


def test_the_middle_is_cut_out_of_the_parts_too():
    tokenizer = models.tokenizer()
    text = "0123456789abcdefghij"
    units = [(0, 4), [(4, 8), (16, 18)], (8, 12), (12, 16)]
    document = kvtrim.Document(text, {"shots": units})
    whole = encode_context(tokenizer, AROUND, document)
    for room in range(3, len(whole) + 1):  # two tokens stand before the context
        cut = encode_ends(tokenizer, AROUND, document, room)
        assert len(cut) == room
        left = room - 2
        gone = set(range((left + 1) // 2, (left + 1) // 2 + 20 - left))
        want = [[at for a, b in ([u] if isinstance(u, tuple) else u) for at in range(a, b)]
                for u in units]  # fmt: skip
        want = ["".join(text[at] for at in unit if at not in gone) for unit in want]
        got = decoded(tokenizer, cut.ids, cut.spans, "shots")
        assert [unit.replace("|", "") for unit in got] == [unit for unit in want if unit]
        assert decoded(tokenizer, cut.ids, cut.spans, "system") == ["<s>["]


def test_a_tokenizer_that_does_not_say_where_tokens_begin():
    class Slow:
        is_fast = False

        def __call__(self, text, **_):
            return models.tokenizer()(text, add_special_tokens=False)

    plain = encode_all(Slow(), "One. Two.", "Why?")
    assert (
        plain.spans == {} and plain.ids == encode_all(models.tokenizer(), "One. Two.", "Why?").ids
    )
    with pytest.raises(UsageError, match="does not say where its tokens begin"):
        encode_all(Slow(), kvtrim.Document("One. Two.", {"shots": [(0, 4)]}), "Why?")


def test_blanks_at_the_end_can_be_taken_off():
    text = "Q: a\n\nQ: b\n\n"
    document = Document(text, {"shots": [(0, 6), [(6, 10), (10, 12)]], "end": [(11, 12)]})
    body, blanks = document.strip()
    assert (body.text, blanks) == ("Q: a\n\nQ: b", "\n\n")
    assert body.spans == {"shots": (((0, 6),), ((6, 10),)), "end": ()}
    assert Document("a", {"all": [(0, 1)]}).strip()[1] == ""
    assert Document(" \n").strip() == (Document(""), " \n")
