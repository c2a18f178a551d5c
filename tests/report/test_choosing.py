"""docs/choosing.md and the picture of README: what the committed records say, nothing else."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import kvtrim
from kvtrim.report.plots import tradeoff

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import choosing  # noqa: E402


def test_the_page_is_what_the_records_say():
    page = choosing.PAGE.read_text(encoding="utf-8")
    assert choosing.filled(page) == page, "run python experiments/choosing.py"
    for method in kvtrim.METHODS:
        known = any(method == key[1] for key in choosing.quality())
        assert not known or method in page


def test_every_figure_of_the_page_comes_from_a_record(monkeypatch):
    page, read = choosing.filled(choosing.PAGE.read_text(encoding="utf-8")), choosing.records

    def other(name):
        rows = read(name)
        if name == "quality/quality.jsonl":
            rows = [row | {"loss": row["loss"] + 1} for row in rows]
        return rows

    monkeypatch.setattr(choosing, "records", other)
    changed = choosing.filled(page)
    found = re.search(r"loss ([\d.]+), ([\d.]+) and ([\d.]+)", page)
    later = "loss {:.2f}, {:.2f} and {:.2f}".format(*(float(each) + 1 for each in found.groups()))
    assert later in changed and found[0] not in changed
    with pytest.raises(SystemExit, match="situations"):
        choosing.filled("no place for figures")


def test_the_picture_was_drawn_from_these_records():
    picture = choosing.PICTURE.read_text(encoding="utf-8")
    assert tradeoff.mark_of(choosing.panels()) in picture, "run python experiments/choosing.py"
    assert all(f">{name}<" in picture for name in (*choosing.DRAWN, *choosing.PROTOCOLS))
    assert len(picture) < 100_000


def test_a_picture_is_the_same_bytes_again():
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    few = {"one": {"snapkv": [(0.5, 1.0, 0.1), (0.1, 2.0, 0.1)]}}
    assert tradeoff.draw(few, "held", "loss") == tradeoff.draw(few, "held", "loss")
    other = {"one": {"snapkv": [(0.5, 1.0, 0.1), (0.1, 2.1, 0.1)]}}
    assert tradeoff.mark_of(few) != tradeoff.mark_of(other)


@pytest.mark.parametrize("keep", [16, 40])
def test_the_arithmetic_of_memory_is_what_a_cache_holds(llama, keep):
    config = json.loads(llama.config.to_json_string())
    ids = torch.randint(3, 250, (1, 100))
    cache = kvtrim.Cache(llama, "streaming-llm", keep=keep)
    size = llama.dtype.itemsize
    with kvtrim.attach(llama), torch.no_grad():
        llama(ids, past_key_values=cache)
    assert cache.held_bytes == choosing.held_bytes(config, keep, size)
    assert cache.full_bytes == 100 * choosing.token_bytes(config, size)
