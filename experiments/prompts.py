"""Prompts that the experiments share: word needles in essays, short LongBench rows, RULER's."""

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtrim.prompts import encode_text
from kvtrim.tasks.base import Request
from kvtrim.tasks.rows import reader
from kvtrim.tasks.ruler import OFFLINE

COLOURS = "purple golden silver crimson hidden frozen gentle ancient broken quiet hollow yellow"
THINGS = (
    "elephant lantern teapot compass violin pumpkin anchor falcon ladder marble saddle thimble"
)
PEOPLE = (
    "old lighthouse keeper",
    "village baker",
    "river ferryman",
    "museum night guard",
    "clock maker",
    "island doctor",
)
MOST_OF_A_TASK = 7
ANSWER = 48


@dataclass(frozen=True)
class Asked:
    """A context, a question, the answer looked for, and the words of it that count."""

    kind: str
    context: str
    question: str
    answer: str
    words: tuple[str, ...]
    prefix: str = ""  # how the answer begins: given, and not judged


def needles(tokenizer: Any, data: Path, count: int, length: int, seed: int = 0) -> Iterator[Asked]:
    """Essays of about `length` tokens with one planted sentence at a random depth."""
    with gzip.open(data / "essays" / "paul_graham.txt.gz", "rt") as file:
        essays = re.sub(r"<<<ESSAY \d\d \S+>>>\n", "", file.read())
    draw = random.Random(seed)
    for _ in range(count):
        start = draw.randrange(len(essays) - 8 * length)
        start = essays.index(". ", start) + 2
        ids = encode_text(tokenizer, essays[start : start + 8 * length])[: length - 70]
        text = tokenizer.decode(ids)
        words = draw.choice(COLOURS.split()), draw.choice(THINGS.split())
        who = draw.choice(PEOPLE)
        at = text.index(". ", int(draw.uniform(0.1, 0.85) * len(text))) + 2
        answer = f"The secret password of the {who} is {words[0]} {words[1]}."
        context = f"{text[:at]}\n\n{answer}\n\n{text[at:]}"
        question = f"What is the secret password of the {who}?"
        yield Asked("needle", context, question, answer, words)


def longbench(tokenizer: Any, data: Path, count: int, longest: int) -> list[Asked]:
    """The LongBench rows that are nearest to `longest` tokens and not longer, in their templates.

    At most `MOST_OF_A_TASK` of one task. An answer is judged by its first `ANSWER` tokens; rows
    whose answer has fewer than three are left out, since its first token may not count.
    """
    folder, found = data / "longbench_mini", []
    templates = json.loads((folder / "templates.json").read_text())
    for task, template in sorted(templates.items()):
        with gzip.open(folder / f"{task}.jsonl.gz", "rt") as file:
            rows = [*map(json.loads, file)]
        before, after = template.split("{context}")
        sized = []
        for number, row in enumerate(rows):
            size, answer = len(encode_text(tokenizer, row["context"])), row["answers"][0].strip()
            ids = encode_text(tokenizer, answer)[:ANSWER]
            if 1000 <= size <= longest and len(ids) >= 3:
                answer = tokenizer.decode(ids)
                question = after.replace("{input}", row["question"])
                asked = Asked(task, before + row["context"], question, answer, _words(answer))
                sized.append((longest - size, task, number, asked))
        found += sorted(sized, key=lambda one: one[:3])[:MOST_OF_A_TASK]
    return [asked for *_, asked in sorted(found, key=lambda one: one[:3])[:count]]


def ruler(tokenizer: Any, data: Path, length: int, each: int = 1, seed: int = 0) -> list[Asked]:
    """RULER's tasks that need no rows of others, `each` samples of all of them in turn."""
    size, rows = (lambda text: len(encode_text(tokenizer, text))), reader(data)
    request = Request(rows=rows, tokens=size, length=length, limit=each, seed=seed)
    made = [[(task.name, sample) for sample in task.samples(request)] for task in OFFLINE]
    found = []
    for name, sample in (one for turn in zip(*made, strict=True) for one in turn):
        ids = encode_text(tokenizer, " " + ", ".join(sample.answers))[:ANSWER]
        given = sample.document.text, sample.question, tokenizer.decode(ids), sample.answers
        found.append(Asked(name, *given, sample.prefix))
    return found


def exercises(
    tokenizer: Any, data: Path, length: int, each: int = 1, seed: int = 0
) -> list[Asked]:
    """Lists of solved problems, kinds of text that calibration has none of.

    One of the first three quarters, with an answer of four tokens at least, is asked for: the
    solution of a GSM8K problem, the right choice of an MMLU question.
    """
    draw, found = random.Random(seed), []
    for _ in range(each):
        for kind, name in (("gsm8k", "train_sample"), ("mmlu", "test")):
            with gzip.open(data / kind / f"{name}.jsonl.gz", "rt") as file:
                rows = draw.sample([*map(json.loads, file)], length // 40)
            solved = [_solved_problem(row) if kind == "gsm8k" else _exam(row) for row in rows]
            texts, size = [], 0
            for question, answer in solved:
                texts.append(f"Question: {question}\nAnswer: {answer}")
                size += len(encode_text(tokenizer, texts[-1] + "\n\n"))
                if size > length:
                    break
            answers = [encode_text(tokenizer, " " + answer) for _, answer in solved]
            judged = [n for n in range(len(texts) * 3 // 4) if len(answers[n]) > 3]
            asked = draw.choice(judged)
            question, answer = solved[asked]
            ids = answers[asked][:ANSWER]
            request = f"What is the answer that the list above gives to this?\n{question}"
            context = "\n\n".join(texts)
            given = context, request, tokenizer.decode(ids), _words(answer)
            found.append(Asked(f"exercise {kind}", *given))
    return found


def _solved_problem(row: dict[str, Any]) -> tuple[str, str]:
    return row["question"], row["answer"].replace("\n####", " The answer is")


def _exam(row: dict[str, Any]) -> tuple[str, str]:
    choices = ", ".join(row["choices"])
    return f"{row['question']} ({choices})", row["choices"][row["answer"]]


def _words(answer: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\w{2,}", answer)))
