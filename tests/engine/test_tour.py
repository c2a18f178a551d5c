"""docs/tour.md is run: its slow session is an oracle of the real one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import kvtrim
import models
from kvtrim.methods.settings import find

PAGE = Path(__file__).parents[2] / "docs" / "tour.md"
KEEP, PROMPT, NEW = 20, 48, 3
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
METHODS = {
    **{name: {"window": 8} for name in ("snapkv", "adakv")},
    **{name: {} for name in ("pyramidkv", "knorm", "keydiff", "streaming-llm", "curdkv", "full")},
}


def test_the_page_is_short():
    assert len([line for line in CODE.splitlines() if line.strip()]) < 60


@pytest.fixture(scope="module")
def model():
    return models.tiny()


@pytest.mark.parametrize("name", METHODS)
def test_the_slow_session_keeps_and_answers_as_the_real_one(model, name):
    names: dict = {}
    exec(compile(CODE, str(PAGE), "exec"), names)
    method, ids = find(name, **METHODS[name]), models.prompt(PROMPT + NEW)
    keep = PROMPT if name == "full" else KEEP
    parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]

    slow = names["SlowSession"](method, keep, model.config.num_hidden_layers)
    AttentionInterface.register("tour", slow.attend)
    before, cache, want = model.config._attn_implementation, DynamicCache(), []
    model.set_attn_implementation("tour")
    with torch.no_grad():
        for part in parts:
            want.append(model(part, past_key_values=cache).logits[:, -1])
    model.set_attn_implementation(before)

    cache, got = kvtrim.Cache(model, method, keep), []
    with torch.no_grad(), kvtrim.attach(model):
        for part in parts:
            got.append(model(part, past_key_values=cache).logits[:, -1])
    held = [slow.held[layer] for layer in sorted(slow.held)]
    assert models.positions(cache) == [[[at for at, *_ in head] for head in x] for x in held]
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-9, atol=1e-9)
