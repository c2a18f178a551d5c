"""The pages of the project: every link leads somewhere, every example runs."""

import re
from pathlib import Path

import pytest
import torch

import kvtrim
import models
from kvtrim.methods.describe.sources import meanings_of
from kvtrim.tasks import Sample, Task
from kvtrim.types import LayerView

ROOT = Path(__file__).parents[1]
OWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
OWN += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")]
PAGES = {str(path.relative_to(ROOT)): path for path in OWN}
RUN = ["README.md", *(name for name in PAGES if name.startswith("docs/guides/"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.S | re.M)


def prose(path):
    return CODE.sub("", path.read_text(encoding="utf-8"))


def anchors(path):
    """The names that headings have, as both GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r" ", "-", each) for each in plain}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    page, wrong = PAGES[name], []
    for link in LINK.findall(prose(page)):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if ":" in place:
            continue
        known = target.exists() and (not anchor or anchor in anchors(target))
        if not known or not target.is_relative_to(ROOT):
            wrong.append(link)
    assert not wrong, f"{name} links to {wrong}"


def test_a_link_to_nowhere_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[one](#a-page), [two](#nowhere), [three](gone.md)\n")
    monkeypatch.setitem(PAGES, "page.md", page)
    monkeypatch.setattr(__import__(__name__), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"links to \['#nowhere', 'gone.md'\]"):
        test_every_link_leads_somewhere("page.md")


def test_the_site_shows_every_page_of_docs():
    text = (ROOT / "mkdocs.yml").read_text()
    shown = set(re.findall(r"[\w/.-]+\.md", text.partition("\nnav:\n")[2]))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= shown, f"add {sorted(pages - shown)} to the navigation of mkdocs.yml"
    later = re.search(r"^LATER = \((.*)\)", (ROOT / "docs" / "hooks.py").read_text(), re.M)[1]
    absent = {page for page in shown - pages if not (ROOT / page).exists()}
    assert absent <= set(re.findall(r'"([^"]+)"', later)), f"no such pages: {absent}"


@pytest.mark.parametrize("name", RUN)
def test_its_examples_run(name, tmp_path, monkeypatch):
    """On a tiny model, which `kvtrim.load` gives whatever is asked for."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", PAGES[name].read_text(encoding="utf-8"), re.S | re.M
    )
    assert blocks
    model = models.tiny("llama", dtype=torch.float32)
    model.config.max_position_embeddings = 4096
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(kvtrim, "load", lambda *_: (model, models.tokenizer(chat=False)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "time_machine.txt").write_text("A sentence of the book. " * 60)
    names = {"__name__": "example", "inputs": {"input_ids": models.prompt(600)}}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def test_the_guide_names_all_that_a_rule_and_a_task_see():
    guide = PAGES["docs/guides/adding.md"].read_text(encoding="utf-8")
    rule, _, task = guide.partition("## What a task is")
    for field in meanings_of(LayerView) or LayerView.__dataclass_fields__:
        assert f"layer.{field}" in rule, field
    for field in (*Task.__dataclass_fields__, *Sample.__dataclass_fields__):
        assert f"`{field}" in task, field
