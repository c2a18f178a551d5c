"""Texts to fit echo on, of many kinds and without licences: made, found with Python, or the
model's own.

    documentation  topics of `pydoc_data`, which comes with Python
    code           modules of Python's standard library
    records        JSON lines, a Markdown table, a log, drawn from a seed
    facts          lists of names with codes, numbers and words that nothing foretells, and such
                   sentences scattered over repeated or plain text, drawn from a seed
    own            what the model itself writes when asked for articles, stories, code, dialogue,
                   contracts and so on, in several languages, sampled from a seed

None of them is part of a benchmark.
"""

import importlib
import inspect
import json
import pydoc_data.topics
import random
from collections.abc import Callable
from typing import Any

import torch

from kvtrim.bench.calibrate import echo_facts

Report = Callable[[str, int, int], None]

TOPICS = 5  # of Python's documentation, the longest ones
MODULES = ("argparse", "statistics", "textwrap", "zipfile", "heapq", "difflib")
WISHES = (
    "Write a very long, detailed newspaper article about a bridge that was closed, with names, "
    "dates, places and numbers.",
    "Write a long short story about a sailor, a lost map and three sisters, with much dialogue.",
    "Write a long encyclopedia article about a town in the mountains: history, geography, people, "
    "economy.",
    "Write a long scientific paper about a new method to measure soil moisture: abstract, "
    "introduction, method, results, discussion.",
    "Write the transcript of a long meeting of a city council with many speakers.",
    "Write a long biography of a composer who lived in the nineteenth century.",
    "Write a long C program that parses configuration files, with comments.",
    "Make a long table with forty rows: name, city, year of birth, profession, salary.",
    "Ecris une longue histoire en francais sur un boulanger et son chien.",
    "Escribe una historia larga en espanol sobre una ciudad junto al mar.",
    "Schreibe eine lange Geschichte auf Deutsch ueber einen Uhrmacher und seine Stadt.",
    "Write a long history of a war between two kingdoms, with the names of generals and battles.",
)
_CHARACTERS = 6  # of a text for each token asked for: more than any tokenizer needs


def compose(length: int, seed: int = 0) -> dict[str, str]:
    """Texts of about `length` tokens or more that take no model, by name."""
    draw, characters = random.Random(seed), _CHARACTERS * length
    topics = pydoc_data.topics.topics
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:TOPICS]
    texts = {f"documentation {name}": topics[name] for name in longest}
    for name in MODULES:
        texts[f"code {name}"] = inspect.getsource(importlib.import_module(name))
    cut = {name: _stretch(text, characters, draw) for name, text in texts.items()}
    for name, line in (("JSON", _order), ("table", _row), ("log", _event)):
        lines: list[str] = []
        while sum(map(len, lines)) < characters // 2:
            lines.append(line(draw, len(lines)))
        cut[f"records {name}"] = "\n".join(lines)
    prose = [cut[f"documentation {name}"] for name in longest]
    for name, text in echo_facts.facts(characters * 2 // 3, draw, prose).items():
        cut[f"facts {name}"] = text
    return cut


def write(
    model: Any, tokenizer: Any, length: int, seed: int = 0, report: Report = lambda *_: None
) -> dict[str, str]:
    """What the model writes when it is asked for texts of `length` tokens, by name."""
    report("the model writes its own texts", 0, 1)
    templated = bool(tokenizer.chat_template)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": wish}], tokenize=False, add_generation_prompt=True
        )
        if templated
        else f"{wish}\n\n"
        for wish in WISHES
    ]
    ids = [tokenizer(prompt, add_special_tokens=not templated).input_ids for prompt in prompts]
    width = max(map(len, ids))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    given = torch.tensor([[pad] * (width - len(own)) + own for own in ids], device=model.device)
    real = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in ids])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        said = model.generate(
            given,
            attention_mask=real.to(model.device),
            do_sample=True,
            temperature=0.9,
            top_p=0.95,
            repetition_penalty=1.05,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=pad,
        )
    texts = tokenizer.batch_decode(said[:, width:], skip_special_tokens=True)
    return {f"own {number}": text for number, text in enumerate(texts)}


def mix(*sources: dict[str, str]) -> dict[str, str]:
    """Texts of all kinds in turn, so that any first part of them has every kind."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for source in sources:
        for name, text in source.items():
            kinds.setdefault(name.split(" ")[0], []).append((name, text))
    longest = max(map(len, kinds.values()))
    turns = [kind[turn] for turn in range(longest) for kind in kinds.values() if turn < len(kind)]
    return dict(turns)


def _stretch(text: str, characters: int, draw: random.Random) -> str:
    """A part of a text, from a line break on."""
    first = draw.randrange(max(1, len(text) - characters))
    return text[text.find("\n", first) + 1 :][:characters]


def _order(draw: random.Random, number: int) -> str:
    user = draw.choice("anna ben carla dmitri eva farid grace hugo".split())
    city = draw.choice("Lyon Oslo Kyoto Quito Porto Cairo Turin Perth".split())
    paid, amount = draw.random() < 0.5, round(draw.uniform(1, 900), 2)
    return json.dumps({"id": number, "user": user, "city": city, "amount": amount, "paid": paid})


def _row(draw: random.Random, number: int) -> str:
    if number < 2:
        return ("| order | article | colour | weight | price |", "|---|---|---|---:|---:|")[number]
    article = draw.choice("lamp chair kettle rug mirror shelf clock basin".split())
    colour = draw.choice("red blue green white black ochre".split())
    price = f"{draw.randrange(5, 900)}.{draw.randrange(10, 99)}"
    return f"| {1000 + 7 * number} | {article} | {colour} | {draw.randrange(1, 40)} kg | {price} |"


def _event(draw: random.Random, number: int) -> str:
    day = f"2021-0{draw.randrange(1, 9)}-{draw.randrange(10, 28)}"
    time = ":".join(f"{draw.randrange(10, top)}" for top in (23, 59, 59))
    level = draw.choice(["INFO", "WARN", "ERROR"])
    what = f"{draw.choice(['net', 'disk', 'auth', 'cache'])}.{draw.choice(['open', 'close'])}"
    took = draw.randrange(1, 999)
    return f"{day} {time} {level} {what} id={draw.randrange(10**6)} took {took} ms"
