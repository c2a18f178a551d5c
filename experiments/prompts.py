"""Prompts that the experiments share: needles of words in essays, and short LongBench rows."""

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
LONGBENCH = ("2wikimqa", "hotpotqa", "multifieldqa_en", "musique", "qasper", "triviaqa", "trec")


@dataclass(frozen=True)
class Asked:
    """A context, a question, the answer looked for, and the words of it that count."""

    kind: str
    context: str
    question: str
    answer: str
    words: tuple[str, ...]


def needles(tokenizer: Any, data: Path, count: int, length: int, seed: int = 0) -> Iterator[Asked]:
    """Essays of about `length` tokens with one planted sentence at a random depth."""
    with gzip.open(data / "essays" / "paul_graham.txt.gz", "rt") as file:
        essays = re.sub(r"<<<ESSAY \d\d \S+>>>\n", "", file.read())
    draw = random.Random(seed)
    for _ in range(count):
        start = draw.randrange(len(essays) - 8 * length)
        start = essays.index(". ", start) + 2
        ids = tokenizer(essays[start : start + 8 * length]).input_ids[: length - 70]
        text = tokenizer.decode(ids)
        words = draw.choice(COLOURS.split()), draw.choice(THINGS.split())
        who = draw.choice(PEOPLE)
        at = text.index(". ", int(draw.uniform(0.1, 0.85) * len(text))) + 2
        answer = f"The secret password of the {who} is {words[0]} {words[1]}."
        context = f"{text[:at]}\n\n{answer}\n\n{text[at:]}"
        question = f"What is the secret password of the {who}?"
        yield Asked("needle", context, question, answer, words)


def longbench(tokenizer: Any, data: Path, count: int, longest: int) -> list[Asked]:
    """The rows of LongBench's question tasks that are nearest to `longest` tokens, not longer."""
    found = []
    for task in LONGBENCH:
        with gzip.open(data / "longbench_mini" / f"{task}.jsonl.gz", "rt") as file:
            for row in map(json.loads, file):
                size = len(tokenizer(row["context"]).input_ids)
                answer = row["answers"][0]
                if size <= longest and len(answer) <= 80:
                    question = f"{row['question']}\nAnswer as briefly as possible."
                    asked = Asked(task, row["context"], question, answer, tuple(answer.split()))
                    found.append((size, len(found), asked))
    return [asked for *_, asked in sorted(found, key=lambda one: one[:2])[-count:]]
