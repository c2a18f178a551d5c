"""Text as tokens come."""

from itertools import pairwise

import hypothesis
import hypothesis.strategies as st
import pytest

import models
from kvtrim.prompts.detokenizer import Detokenizer
from kvtrim.serve.stream import Stops


@pytest.mark.parametrize("step", [1, 2, 5])
def test_pieces_are_the_decoded_answer_and_whole_characters(step):
    tokenizer = models.tokenizer()
    text = "naïve café 日本語 🙂 end"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_does():
    tokenizer = models.tokenizer()
    ids = tokenizer("ab🙂", add_special_tokens=False).input_ids[:-1]
    stream = Detokenizer(tokenizer)
    shown = stream.add(ids) + stream.end()
    assert shown == tokenizer.decode(ids)


@hypothesis.given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_stops_end_a_text_where_they_would_in_one_piece(text, texts, cuts):
    places = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    stops, shown = Stops(texts), ""
    for start, end in pairwise(places):
        shown += stops.add(text[start:end])
    shown += stops.end()
    found = [text.find(stop) for stop in texts if stop in text]
    if stops.found is None:
        assert shown == text and not found
    else:
        assert found and text.startswith(shown + stops.found)
    if len(texts) == 1 and found:
        assert shown == text[: found[0]]
