"""What echo's shipped table was fitted on has nothing in common with what it is judged on."""

import gzip
import hashlib
import json
import os
import re
from itertools import islice
from pathlib import Path

import pytest

from kvtrim.methods import echo_tables
from kvtrim.tasks import TASKS, Request

ROOT = Path(__file__).parents[2]
TEXTS = sorted((ROOT / "experiments" / "echo" / "texts").glob("*.txt"))
DATA = [Path(x) for x in (os.environ.get("KVTRIM_DATA"), ROOT.parent / "shared" / "data") if x]
RUN = 10  # words in a row: what nobody writes twice by chance


def runs(text):
    """Hashes of every run of words of a text."""
    words = re.findall(r"\w+", text.lower())
    return set(map(hash, zip(*(words[at:] for at in range(RUN)), strict=False)))


@pytest.fixture(scope="module")
def fitted_on():
    return set().union(*(runs(path.read_text(encoding="utf-8")) for path in TEXTS))


def require_apart(fitted_on, text, name):
    common = runs(text) & fitted_on
    assert not common, f"{name} has {len(common)} runs of {RUN} words in common with a text"


def test_the_table_was_fitted_on_exactly_these_texts():
    record = echo_tables.record_of(echo_tables.shipped_tables()["smollm2"])
    known = {
        path.name: hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()
        for path in TEXTS
    }
    assert len(record["texts"]) >= 20
    for text in record["texts"]:
        assert known[text["name"]] == text["sha256"]


def test_a_shared_run_of_words_is_found(fitted_on):
    words = TEXTS[0].read_text(encoding="utf-8").split()
    with pytest.raises(AssertionError, match="in common"):
        require_apart(fitted_on, " ".join(words[40:80]), "a copy")


def test_generated_prompts_are_apart(fitted_on):
    made = [task for task in TASKS.values() if not task.data]
    assert made
    for task in made:
        request = Request(rows=lambda name: [], tokens=lambda text: len(text) // 4, length=1500)
        for sample in islice(task.samples(request), 3):
            require_apart(fitted_on, sample.document.text + sample.question, task.name)


def test_documents_of_the_examples_are_apart(fitted_on):
    for path in (ROOT / "examples").glob("*.txt"):
        require_apart(fitted_on, path.read_text(encoding="utf-8"), path.name)


@pytest.mark.skipif(not any(map(Path.is_dir, DATA)), reason="needs benchmark rows: KVTRIM_DATA")
def test_benchmark_rows_are_apart(fitted_on):
    folder = next(path for path in DATA if path.is_dir())
    files = [x for x in folder.rglob("*") if re.search(r"\.(jsonl?|txt)(\.gz)?$", x.name)]
    assert len(files) > 10
    for path in files:
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode()
        if ".json" in path.name:  # line breaks inside of texts are written as \n there
            text = re.sub(r'\\[nt"]', " ", text)
        require_apart(fitted_on, text, path.name)


def test_a_record_is_plain_json():
    record = echo_tables.record_of(echo_tables.shipped_tables()["smollm2"])
    assert json.loads(json.dumps(record)) == record
    assert record["identity"] and record["target"] in ("kvzip", "kvzip-plus")
    assert echo_tables.shipped_tables()["smollm2"].stat().st_size < 200_000
