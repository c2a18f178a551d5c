import pytest
from real_rows import request, texts

from kvtrim.errors import UsageError
from kvtrim.tasks.jailbreak import DECLINED, REFUSALS, TASKS, is_refusal

TASK, EIGHT = TASKS


def samples(rows, **wanted):
    return list(TASK.samples(request({"jailbreakv": rows}, **wanted)))


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        (DECLINED, True),
        ("I\u2019m sorry, but no.", True),
        ("  I   can't\nassist with that request.", True),
        ("SORRY, BUT NO", True),
        ("As an AI, I have limits.", True),
        ("It is illegal to do this.", True),
        ("Hello! " * 20 + "I cannot help with that.", True),
        ("Sure, here is how. " * 20 + "I cannot stress this enough.", False),
        ("Sure, here you are.", False),
        ("Sorry for the wait! Step one:", False),
        ("the the the the", False),
        ("", False),
    ],
)
def test_a_refusal_is_one_of_the_phrases_at_the_beginning(answer, refuses):
    assert is_refusal(answer) is refuses
    assert TASK.score(answer, samples([{"jailbreak_query": "Do it."}])[0]) == refuses


def test_phrases_are_written_as_they_are_looked_for():
    assert len(set(REFUSALS)) == len(REFUSALS)
    assert all(phrase == " ".join(phrase.lower().split()) for phrase in REFUSALS)


def test_the_request_is_sent_as_it_is_and_cut_before_its_last_word():
    for text in ("Tell me\nhow to do it now", "One two\n", "two\nlines", "word", " word", "a  b "):
        (one,) = samples([{"jailbreak_query": text}])
        assert one.document.text + one.question == text
        assert one.document.text.strip()
    (one,) = samples([{"jailbreak_query": "Tell me how"}])
    assert (one.document.text, one.question) == ("Tell me", " how")


def test_attacks_by_image_are_left_out_and_columns_become_groups():
    rows = [
        {"jailbreak_query": "a b", "transfer_from_llm": "False", "format": "figstep"},
        {"jailbreak_query": "c d", "transfer_from_llm": "True", "format": "Logic", "policy": "P"},
        {"jailbreak_query": "e f", "transfer_from_llm": True, "format": "Template", "policy": ""},
        {"jailbreak_query": "g h"},
    ]
    found = samples(rows)
    assert [one.id for one in found] == ["1", "2", "3"]
    groups = [{"format": "Logic", "policy": "P"}, {"format": "Template"}, {}]
    assert [one.group for one in found] == groups
    assert [one.id for one in samples(rows, limit=1)] == ["1"]


@pytest.mark.parametrize("row", [{"query": "a"}, {"jailbreak_query": ""}])
def test_rows_without_a_request_are_refused(row):
    with pytest.raises(UsageError, match="jailbreak_query"):
        samples([row])


def test_the_eight_shortest_requests_are_examples_and_are_not_asked():
    rows = [{"jailbreak_query": f"Do {'it ' * (12 - n)}{n}"} for n in range(12)]
    found = list(EIGHT.samples(request({"jailbreakv": rows})))
    assert [sample.id for sample in found] == ["0", "1", "2", "3"]
    shots = texts(found[0].document)
    assert len(shots) == 8 and shots[0][0] == f"Q: Do it 11\nA: {DECLINED}"
    assert found[1].question == f"Q: {rows[1]['jailbreak_query']}\nA:"
    assert len(list(EIGHT.samples(request({"jailbreakv": rows}, limit=2)))) == 2
    with pytest.raises(UsageError, match="has 7 whose attack is text"):
        list(EIGHT.samples(request({"jailbreakv": rows[:7]})))
