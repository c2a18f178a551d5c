import pytest
from real_rows import named, needs_data, request, texts

from kvtrim.errors import UsageError
from kvtrim.tasks.gsm8k import TASKS, gold, solution_of

COT = [
    {"question": f"How many is {n}?", "answer": f"It is {n}. The answer is {n}."} for n in "123"
]
TEST = [
    {"id": 0, "question": "Sum?", "answer": "1 + 1 = <<1+1=2>>2\nSo 2,000.\n#### 2,000"},
    {"id": 2, "question": "Cold?", "answer": "It is -10.\n#### -10"},
]
ROWS = {"gsm8k/cot8": COT, "gsm8k/test": TEST}


def samples(name, rows=ROWS, **wanted):
    return list(named(TASKS, name).samples(request(rows, **wanted)))


def test_the_prompt_is_that_of_the_harness():
    first = samples("gsm8k-2")[0]
    assert first.document.text + first.question == (
        "Q: How many is 1?\nA: It is 1. The answer is 1.\n\n"
        "Q: How many is 2?\nA: It is 2. The answer is 2.\n\n"
        "Q: Sum?\nA:"
    )
    assert texts(first.document) == [
        ["Q: How many is 1?\nA: It is 1. The answer is 1."],
        ["Q: How many is 2?\nA: It is 2. The answer is 2."],
    ]
    assert first.answers == (" 1 + 1 = 2\nSo 2,000.\nThe answer is 2,000.",)


def test_without_examples_one_sentence_asks_for_the_form_of_the_answer():
    first = samples("gsm8k-0", {"gsm8k/test": TEST})[0]
    assert "The answer is N." in first.document.text
    assert first.document.text.endswith("\n\n")
    assert not first.document.spans


def test_samples_keep_their_number_and_stop_at_the_limit():
    assert [sample.id for sample in samples("gsm8k-1")] == ["0", "2"]
    assert [sample.id for sample in samples("gsm8k-1", limit=1)] == ["0"]
    assert samples("gsm8k-1", limit=0) == []


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        (" 2 x 1000. The answer is 2,000.", 1),
        ("The answer is $2000", 1),
        ("that makes 2000.00 dollars.", 1),
        ("The answer is 2. No: 2000", 0),
        ("The answer is \u22122000.", 0),
        ("two thousand", 0),
        ("", 0),
    ],
)
def test_an_answer_is_right_if_its_number_is(answer, worth):
    sample = samples("gsm8k-1")[0]
    assert named(TASKS, "gsm8k-1").score(answer, sample) == worth


def test_a_negative_gold_needs_its_minus_sign():
    score, sample = named(TASKS, "gsm8k-1").score, samples("gsm8k-1")[1]
    assert score("The answer is \u221210 degrees.", sample) == 1
    assert score("The answer is 10.", sample) == 0


def test_fifty_examples_are_the_first_that_are_short_enough():
    def row(number, size):
        return {"id": number, "question": "x" * size, "answer": f"{number}<<1=1>>\n#### {number}"}

    train = [row(n, 500 if n % 2 else 20) for n in range(200)]
    sample = samples("gsm8k-50", {"gsm8k/train": train, "gsm8k/test": TEST})[0]
    shots = [shot for (shot,) in texts(sample.document)]
    assert shots == [f"Q: {'x' * 20}\nA: {n}\nThe answer is {n}." for n in range(0, 100, 2)]
    with pytest.raises(UsageError, match="first 1,000 rows"):
        samples("gsm8k-50", {"gsm8k/train": train[:90], "gsm8k/test": TEST})


@needs_data
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_real_gold_answer_scores_one(task):
    found = list(task.samples(request()))
    assert len({sample.id for sample in found}) == len(found) > 900
    assert all(task.score(sample.answers[0], sample) == 1 for sample in found)
    shots = texts(found[0].document) if found[0].document.spans else []
    assert task.name == f"gsm8k-{len(shots)}"


@needs_data
def test_real_golds_are_the_rows_own():
    rows = request().rows("gsm8k/test")
    assert [gold(row) for row in rows] == [row["final"] for row in rows]
    assert not any("<<" in solution_of(row) for row in rows)


@needs_data
def test_fifty_real_examples_are_all_short_and_over_four_thousand_tokens_or_so():
    document = next(named(TASKS, "gsm8k-50").samples(request())).document
    assert max(len(shot) for (shot,) in texts(document)) <= 400
    assert 15_000 < len(document.text) < 17_000
