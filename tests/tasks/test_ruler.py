"""RULER: official wording, the length asked for, the same prompts for the same seed."""

import gzip
import json
import re
import sys

import pytest

from kvtrim.errors import UsageError
from kvtrim.tasks import GROUPS, TASKS, Request
from kvtrim.tasks.ruler import NEEDLES, needles, words
from kvtrim.tasks.ruler.needles import NOISE

OFFLINE = GROUPS["ruler-offline"]
SQUAD = [
    {
        "id": str(number),
        "title": f"T{number % 2}",
        "question": f"Question {number}?",
        "answers": [f"answer {number}", "other"] if number != 1 else [],
        "documents": [f"Paragraph {number} holds answer {number} and little else."],
    }
    for number in range(30)
]
HOTPOT = [
    {
        "id": str(number),
        "title": "",
        "question": f"Question {number}?",
        "answers": [f"answer {number}"],
        "documents": [f"T{page}\nPage {page} is about {page}." for page in (number, number + 1)],
    }
    for number in range(30)
]


def samples(ask, name, **given):
    return list(TASKS[name].samples(ask(squad=SQUAD, hotpotqa=HOTPOT, **given)))


def text(sample):
    return sample.document.text + sample.question + sample.prefix


@pytest.mark.parametrize("name", GROUPS["ruler"])
@pytest.mark.parametrize("length", [900, 2000])
def test_prompts_have_the_length_asked_for(ask, name, length):
    for sample in samples(ask, name, length=length, limit=3):
        used = len(text(sample).split()) + TASKS[name].max_new_tokens
        longest = 30 if "qa" not in name else length  # the few documents of this test run out
        assert length - longest <= used <= length
        assert sample.group == {"length": length}


@pytest.mark.parametrize("name", GROUPS["ruler"])
def test_samples_depend_on_seed_and_number_alone(ask, name):
    found = samples(ask, name, length=900, limit=3)
    assert found == samples(ask, name, length=900, limit=3)
    assert found[:2] == samples(ask, name, length=900, limit=2)
    assert [sample.id for sample in found] == ["900/0", "900/1", "900/2"]
    assert len({text(sample) for sample in found}) == 3
    other = samples(ask, name, length=900, limit=3, seed=1)
    assert {text(sample) for sample in found}.isdisjoint(map(text, other))


@pytest.mark.parametrize("name", GROUPS["ruler"])
def test_few_texts_are_tokenised(ask, name):
    calls = []

    def tokens(text):
        calls.append(text)
        return len(text) // 4

    samples(ask, name, length=8000, limit=2, tokens=tokens)
    assert len(calls) <= 2 * 12


@pytest.mark.parametrize("name", OFFLINE)
def test_the_answer_is_in_the_document_and_scores_one(ask, name):
    for sample in samples(ask, name, length=900, limit=2):
        expected = sample.extra["expected"]
        assert all(one in sample.document.text for one in expected)
        assert all(one in sample.answers[0] for one in expected)
        assert TASKS[name].score(f"So: {sample.answers[0]}.", sample) == 1
        assert TASKS[name].score("", sample) == 0
        assert TASKS[name].score(expected[0].upper(), sample) >= 1 / len(expected)


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_planted_once_each(ask, name):
    _, task = NEEDLES[name]
    for sample in samples(ask, f"ruler-niah-{name}", length=900, limit=3):
        context = sample.document.text.partition("\n")[2]
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
        values = [value for _, value in found]
        assert len(set(values)) == len(values)
        assert set(sample.extra["expected"]) <= set(values)
        if task.hay != "needles":
            assert len(found) == task.keys * task.values
        asked = {key for key, value in found if value in sample.extra["expected"]}
        assert len(asked) == task.asked and all(key in sample.question for key in asked)
        assert len(sample.extra["expected"]) == task.asked * task.values


def test_the_singular_and_the_plural_are_the_official_ones(ask):
    (one,) = samples(ask, "ruler-niah-single-1", limit=1)
    key = re.search("for (\\S+) mentioned", one.question)[1]
    assert one.document.text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the number afterwards.\n{NOISE}\n"
    )
    assert one.question == (
        f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    )
    assert one.prefix == f" The special magic number for {key} mentioned in the provided text is"
    (many,) = samples(ask, "ruler-niah-multiquery", limit=1)
    assert many.document.text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\nEssay 0"
    )
    asked = re.search("numbers for (.*) mentioned", many.question)[1]
    assert re.fullmatch(r"(\S+, ){3}and \S+", asked)
    assert many.question == (
        f"\nWhat are all the special magic numbers for {asked} mentioned in the provided text?"
    )
    assert many.prefix == (
        f" The special magic numbers for {asked} mentioned in the provided text are"
    )


def test_the_wording_is_that_of_the_data(data):
    """Rows of RULER's own generator: their needles, key and value, in our words."""
    path = data.folder / "ruler/niah_multikey_3_4k.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    task = NEEDLES["multikey-3"][1]
    for row in rows:
        key = re.search(r"for (\S+) mentioned", row["question"])[1]
        sample = needles._ask(task, row["context"], [key], row["answers"])
        assert text(sample) == row["prompt"] and sample.answers == tuple(row["answers"])
        assert sample.question.strip() == row["question"] and sample.prefix == row["answer_prefix"]


def test_needles_among_needles_look_like_the_datas(data):
    path = data.folder / "ruler/niah_multikey_3_4k.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        theirs = json.loads(next(iter(file)))["prompt"]
    request = Request(data, lambda text: len(text) // 2, 4096, 1)
    (ours,) = TASKS["ruler-niah-multikey-3"].samples(request)

    def shape(prompt):
        return {re.sub(r"[0-9a-f]", "x", line) for line in prompt.splitlines()}

    assert shape(text(ours)) == shape(theirs)


def test_a_chain_of_variables_after_an_example(ask):
    (sample,) = samples(ask, "ruler-vt", length=1000, limit=1)
    assert list(sample.document.spans) == ["shots"]
    ((_, end),) = sample.document.spans["shots"][0]
    example, rest = sample.document.text[:end], sample.document.text[end:]
    assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}\n\n$", example)
    names, value = sample.extra["expected"], re.search(r"value (\d{5}) in", sample.question)[1]
    lines = [line for line in rest.splitlines() if line.startswith("VAR")]
    assert lines == [
        f"VAR {names[0]} = {value}",
        *(f"VAR {names[hop + 1]} = VAR {names[hop]} " for hop in range(4)),
    ]
    assert set(rest.splitlines()) - set(lines) == {
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        "",
        NOISE,
    }
    assert sample.prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (5000, 30, 3)])
def test_common_words_are_common(ask, length, often, seldom):
    (sample,) = samples(ask, "ruler-cwe", length=length, limit=1)
    ((_, end),) = sample.document.spans["shots"][0]
    listed = sample.document.text[end:].partition("\n")[2]
    found = re.split(r" ?\d+\. ", listed)[1:]
    counts = {word: found.count(word) for word in found}
    assert {word for word, times in counts.items() if times == often} == set(
        sample.extra["expected"]
    )
    assert set(counts.values()) == {often, seldom}
    assert sample.document.text[:end].endswith("\n") and " 10. " in sample.answers[0]


def test_more_words_than_there_are(monkeypatch, ask):
    monkeypatch.setattr(words, "words", lambda kind: ("cat", "dog", "owl", kind))
    listed, right = words._numbered_list(words.Draw(0), 20, 2, 1)
    assert len(set(re.split(r" ?\d+\. ", listed)[1:])) == 20 and len(right) == 10


@pytest.mark.parametrize("length", [400, 900, 4000])
def test_the_three_most_frequent_codes_are_no_matter_of_chance(ask, length):
    (sample,) = samples(ask, "ruler-fwe", length=length, limit=1)
    found = sample.document.text.partition("coded words. ")[2].split()
    counts = sorted(((found.count(word), word) for word in set(found)), reverse=True)
    assert counts[0][1] == "..." and [word for _, word in counts[1:4]] == sample.extra["expected"]
    assert counts[3][0] > counts[4][0]


@pytest.mark.parametrize(("name", "rows"), [("ruler-qa-1", SQUAD), ("ruler-qa-2", HOTPOT)])
def test_questions_keep_their_own_documents(ask, name, rows):
    answerable = [row for row in rows if row["answers"]]
    for sample, row in zip(samples(ask, name, length=180, limit=4), answerable, strict=False):
        assert all(page in sample.document.text for page in row["documents"])
        assert sample.question.endswith(f"\n\nQuestion: {row['question']}")
        assert sample.prefix == " Answer:" and sample.answers == tuple(row["answers"])
        spans = sample.document.spans["passages"]
        pages = [sample.document.text[start:end] for ((start, end),) in spans]
        assert [page.split(":")[0] for page in pages] == [
            f"Document {place}" for place in range(1, len(pages) + 1)
        ]
        assert sample.document.text.endswith("\n\n".join(pages))
        assert len(set(pages)) == len(pages) > 2
        assert TASKS[name].score(f"it is {row['answers'][-1]}", sample) == 1


def test_paragraphs_of_the_same_title_come_first(ask):
    (sample,) = samples(ask, "ruler-qa-1", length=180, limit=1)
    assert not {f"Paragraph {odd} " for odd in range(1, 30, 2)} & set(
        re.findall(r"Paragraph \d+ ", sample.document.text)
    )


def test_all_the_documents_there_are(ask):
    (sample,) = samples(ask, "ruler-qa-1", length=9000, limit=1)
    assert len(sample.document.spans["passages"]) == len(SQUAD)


def test_a_hundred_samples_unless_told_otherwise(ask):
    assert len(samples(ask, "ruler-niah-single-1", length=300)) == 100
    assert len(samples(ask, "ruler-qa-1", length=180)) == 29  # as many as can be answered


def test_what_is_missing_is_said(ask, monkeypatch):
    with pytest.raises(UsageError, match="ask for at least"):
        samples(ask, "ruler-vt", length=100, limit=1)
    with pytest.raises(UsageError, match="no row has an answer"):
        list(TASKS["ruler-qa-1"].samples(ask(squad=[{**SQUAD[0], "answers": []}])))
    words.words.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(UsageError, match=r"pip install 'kvtrim\[eval\]'"):
        samples(ask, "ruler-cwe", limit=1)
