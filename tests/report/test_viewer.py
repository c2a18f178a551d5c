"""What was kept of a prompt as one page: what is packed comes out again, and text stays text."""

import base64
import json
import re
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kvtrim.errors import FileError, UsageError
from kvtrim.report.viewer import evidence, pack
from kvtrim.report.viewer.exhibit import Exhibit, Said, Stop

HOSTILE = ["<b>", "</script>", "<!--", "\x1b[31m", "\u202e", "a\r\n", "🙂", "", "é"]


def numbers(content):
    """By plain loops: 7 bits a byte, the lowest first, the last byte below 128."""
    found, value, shift = [], 0, 0
    for byte in content:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found


def heads_in(runs):
    content = zlib.decompress(base64.b64decode(runs["packed"]))
    a, b, c = runs["sizes"]
    assert len(content) == a + b + c
    counts = numbers(content[:a])
    pairs = zip(numbers(content[a : a + b]), numbers(content[a + b :]), strict=True)
    found = []
    for count in counts:
        at, own = 0, []
        for _ in range(count):
            gap, length = next(pairs)
            own += range(at + gap, at + gap + length)
            at += gap + length
        found.append(own)
    assert next(pairs, None) is None
    return found


def data_of(exhibit):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', exhibit.html)
    return json.loads(found[1])


def shown(data, number):
    """What a stop keeps, as the page works it out."""
    stop = data["stops"][number]
    own = heads_in(stop["runs"])
    if stop["within"] is None:
        return own
    larger = shown(data, stop["within"])
    return [[among[place] for place in each] for each, among in zip(own, larger, strict=True)]


def arrays(heads):
    return [np.array(sorted(head), np.int32) for head in heads]


def exhibit_of(pieces, kept, **more):
    """Stops by method and budget; `kept` has one layer of heads for each."""
    stops = [Stop(*name.split(), [arrays(heads)], 10, 100) for name, heads in kept.items()]
    return Exhibit(pieces, stops, layers=[0], **more)


@hypothesis.given(st.lists(st.sets(st.integers(0, 400_000), max_size=40), max_size=4))
def test_packed_positions_come_out_again(heads):
    assert heads_in(pack.pack_runs(arrays(heads))) == [sorted(head) for head in heads]


@hypothesis.given(st.lists(st.integers(0, 2**35 - 1)))
def test_packed_numbers_come_out_again(given):
    assert numbers(zlib.decompress(base64.b64decode(pack.pack_numbers(given)))) == given


@hypothesis.given(
    st.lists(st.tuples(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30))), min_size=1)
)
def test_what_is_among_a_larger_budget_comes_out_again(pairs):
    smaller, larger = zip(*pairs, strict=True)
    found = pack.places_within(arrays(smaller), arrays(larger))
    if not all(own <= others for own, others in pairs):
        assert found is None
        return
    for places, own, others in zip(found, smaller, arrays(larger), strict=True):
        assert others[places].tolist() == sorted(own)


def test_every_stop_of_a_page_says_what_was_kept():
    kept = {
        "full all": [{*range(12)}, {*range(12)}],
        "a 50%": [{0, 1, 2, 7, 8, 11}, {3, 4, 5, 6, 7, 8}],
        "a 25%": [{0, 7, 8}, {4, 5, 8}],
        "a 10%": [{7}, {9}],  # not among the larger ones
        "b 25%": [{1, 2, 3}, {0, 1, 2}],
    }
    data = data_of(exhibit_of([*"abcdefghijkl"], kept))
    for number, heads in enumerate(kept.values()):
        assert shown(data, number) == [sorted(head) for head in heads]
    assert [stop["within"] for stop in data["stops"]] == [None, None, 1, None, None]
    assert data["budgets"] == ["10%", "25%", "50%"]
    assert data["stops"][1]["entries"] == [[6, 6]]


def test_a_page_shows_text_as_text_and_asks_for_nothing():
    said = "<img src=x> \x07"
    made = exhibit_of(HOSTILE, {"<i>a</i> 1%": [{0}]}, question=said, reference=said, about=[said])
    head, _, rest = made.html.partition('id="data">')
    data, _, script = rest.partition("</script>")
    assert "<" not in data and "\x07" not in made.html and "\x1b" not in made.html
    assert "\u202e" not in made.html and script.count("</script>") == 1
    parsed = json.loads(data)
    assert parsed["text"] == "<b></script><!--\\x1b[31m\\u202ea\\x0d\n🙂é"
    units = numbers(zlib.decompress(base64.b64decode(parsed["lengths"])))
    assert units == [3, 9, 4, 8, 6, 6, 2, 0, 1]  # as scripts count characters
    assert "default-src 'none'" in head and not re.search(
        r"(src|href)=|https?:|url\(", head + script
    )
    assert made.html.count("<script") == 2
    frame = made._repr_html_()
    assert 'sandbox="allow-scripts"' in frame and "<script" not in frame and "<b>" not in frame


def test_a_page_is_written_whole(tmp_path):
    made = exhibit_of(["a"], {"a 1": [{0}]})
    made.save(tmp_path / "kept.html")
    assert (tmp_path / "kept.html").read_text("utf-8") == made.html
    with pytest.raises(FileError, match="nowhere"):
        made.save(tmp_path / "nowhere" / "kept.html")


@pytest.mark.parametrize(
    "pieces,stops",
    [
        (["a"], []),
        ([], [Stop("a", "1", [arrays([{0}])], 1, 1)]),
        (["a"], [Stop("a", "1", [arrays([{1}])], 1, 1)]),
        (["a"], [Stop("a", "1", [], 1, 1)]),
    ],
)
def test_stops_of_another_prompt_are_refused(pieces, stops):
    with pytest.raises(UsageError):
        Exhibit(pieces, stops, layers=[0])


def test_evidence_says_how_much_of_it_is_kept():
    kept = {"full all": [{0, 1, 2, 3}, {0, 1, 2, 3}], "a 50%": [{0, 1}, {0, 3}]}
    marks = evidence.find(["The", " cat", " sat", "."], ["cat SAT"])
    data = data_of(exhibit_of(["The", " cat", " sat", "."], kept, evidence=marks))
    assert data["evidence"] == [[1, 3, True]]
    assert [stop["evidence"] for stop in data["stops"]] == [[1.0, 0, 2], [0.25, 1, 2]]


def test_evidence_is_found_whatever_its_lines_and_characters():
    pieces = ["The ", "", "", "🙂", " CAT", "\n", "sat; ", "the cat sat"]
    assert evidence.find(pieces, ["🙂 cat sat"]) == [evidence.Evidence(1, 7, True)]
    assert [each.start for each in evidence.find(pieces, ["cat sat"])] == [4, 7]
    for absent in ("dog", " ", "ca"):
        with pytest.raises(UsageError, match="does not stand"):
            evidence.find(pieces, [absent])


def test_the_answers_own_words_are_its_evidence():
    pieces = ["It is told: ", "the password", " is ", "purple", " elephant", ". It is ", "late."]
    found = evidence.find_answer(
        pieces, "The password is Purple elephant!", "What is the password?"
    )
    assert [(each.start, each.end) for each in found] == [(1, 5)] and not found[0].given
    assert evidence.find_answer(pieces, "It is the password.", "What is the password?") == []
    often = ["purple "] * 9
    assert evidence.find_answer(often, "purple", "?") == []
    asked = ["late ", "What is purple?", " purple"]
    assert evidence.find_answer(asked[:2], "purple", "What is purple?") == []


def test_128k_tokens_of_two_methods_at_four_budgets_take_less_than_20_mb():
    """Of 32 layers with 8 heads: those of a few heads, times as many as there are."""
    tokens, heads, few = 131_072, 256, 4
    generator = np.random.default_rng(0)
    window = np.ones(7) / 7  # neighbours stay together, as under pooled scores
    scores = [np.convolve(generator.random(tokens), window, "same") for _ in range(few)]
    order = [np.argsort(-each, kind="stable") for each in scores]
    kept = {
        f"a {share}": [np.sort(each[: int(share * tokens)]) for each in order]
        for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    }
    stops = [Stop(*name.split(), [own], 1, 1) for name, own in kept.items()]
    data = data_of(Exhibit([" word"] * tokens, stops, layers=[0]))
    packed = sum(len(stop["runs"]["packed"]) for stop in data["stops"])
    assert 2 * packed * heads / few + 6 * tokens < 20e6  # text, and where its tokens end
    assert all(stop["within"] is not None for stop in data["stops"][:3])


def test_an_answer_stands_at_its_stop():
    stop = Stop("a", "1", [arrays([{0}])], 1, 2, "a remark", Said("yes", -1.234))
    one = data_of(Exhibit(["a"], [stop], layers=[4]))["stops"][0]
    assert (one["said"], one["logProb"], one["share"], one["remark"]) == (
        "yes",
        "-1.23",
        "50.0 %",
        "a remark",
    )
