import pytest
from real_rows import named, needs_data, request, texts

from kvtrim.errors import UsageError
from kvtrim.tasks.longgenbench import TASKS, parse_answers

TEXTS = {
    "system": "Answer all.",
    "user_head": "Examples: \n",
    "examples": "Question_1: \nOne?\n\nQuestion_2: \nTwo?\n\nAnswer_1:\n1.\n\nAnswer_2:\n2.",
    "user_middle": "\n\nFollowing Question: \n",
    "question_item": "Question_{i}:\n{q}\n",
    "user_tail": "\n",
    "first_question_number": 9,
}
TEST = [
    {"id": n, "question": f"{{{n}}}?", "answer": f"Well.\n#### {n:,}"}
    for n in (1000, -2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
]
ROWS = {"longgenbench": [TEXTS], "gsm8k/test": TEST}
TASK = named(TASKS, "longgenbench-gsm8k-5")
RIGHT = {9: "1,000", 10: "-2", 11: "3", 12: "4", 13: "5"}


def sample():
    return next(TASK.samples(request(ROWS)))


def worth(finals):
    said = [f"Answer_{number}:\nThe answer is {final}." for number, final in finals.items()]
    return TASK.score("\n\n".join(said), sample())


def test_the_prompt_is_upstreams_with_the_system_message_in_front():
    assert sample().document.text == "Answer all.\n\nExamples: \n" + TEXTS["examples"]
    assert sample().question == (
        "\n\nFollowing Question: \nQuestion_9:\n{1000}?\nQuestion_10:\n{-2}?\n"
        "Question_11:\n{3}?\nQuestion_12:\n{4}?\nQuestion_13:\n{5}?\n\n"
    )


def test_an_example_is_its_question_and_its_answer():
    assert texts(sample().document) == [
        ["Question_1: \nOne?\n\n", "Answer_1:\n1.\n\n"],
        ["Question_2: \nTwo?\n\n", "Answer_2:\n2."],
    ]


def test_examples_without_answers_are_refused():
    broken = {**TEXTS, "examples": TEXTS["examples"].replace("Answer_2", "Answer_3")}
    with pytest.raises(UsageError, match="numbered pairs"):
        next(TASK.samples(request({**ROWS, "longgenbench": [broken]})))


def test_only_whole_prompts_are_asked():
    found = list(TASK.samples(request(ROWS)))
    assert [one.extra["rows"] for one in found] == [[1000, -2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert len(list(TASK.samples(request(ROWS, limit=1)))) == 1
    assert list(named(TASKS, "longgenbench-gsm8k").samples(request(ROWS))) == []


def test_every_gold_answer_is_right_commas_and_minus_signs_included():
    assert worth(RIGHT) == 1
    assert TASK.score(sample().answers[0], sample()) == 1
    assert worth({**RIGHT, 10: "\u22122", 9: "1000.0"}) == 1
    assert worth({**RIGHT, 10: "2"}) == 0.8


def test_a_missing_answer_is_wrong_and_moves_no_other():
    assert worth({n: final for n, final in RIGHT.items() if n != 10}) == 0.8
    assert worth({13: "5", 9: "1000"}) == 0.4  # in any order
    assert worth({}) == 0


def test_answers_under_other_numbers_do_not_count():
    assert worth({1: "1000", 2: "-2", 3: "3"}) == 0
    assert worth({**RIGHT, 14: "77", 99: "1"}) == 1


def test_the_first_answer_to_a_number_counts_and_ends_at_the_next_heading():
    assert parse_answers("Answer_9:\n1\n\nAnswer_9:\n2") == {9: ":\n1\n\n"}
    assert parse_answers("Answer_9: 1\nQuestion_10:\n7 or 8?\nANSWER 10: 4")[9].strip() == ": 1"
    assert parse_answers("ANSWER 10: 4 ...") == {10: ": 4 ..."}
    assert parse_answers("**Answer #9:** 4, so the answer 12 is wrong") == {
        9: ":** 4, so the answer 12 is wrong"
    }
    assert parse_answers("") == {}
    said = "Answer_9:\nThe answer is 1,000.\nQuestion_10:\n-2?\n"
    assert TASK.score(said, sample()) == 0.2


@needs_data
def test_real_rows_make_twenty_prompts_whose_gold_answers_score_one():
    for task, problems in zip(TASKS, (35, 5), strict=True):
        found = list(task.samples(request()))
        assert [len(one.extra["finals"]) for one in found] == [problems] * 20
        assert all(task.score(one.answers[0], one) == 1 for one in found)
        shots = texts(found[0].document)
        assert len(shots) == 8
        for number, (question, answer) in enumerate(shots, start=1):
            assert question.startswith(f"Question_{number}:")
            assert answer.startswith(f"Answer_{number}:")
            assert "The answer is" in answer
