"""PyramidInfer's generation stage: an answer is cut in blocks, as plain loops cut it."""

from math import cos, exp, pi

import pytest
import torch

import kvtrim
import models
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.errors import UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import find

PROMPT, TOTAL, LAYERS = 20, 70, 3
EVERY, SHARE, DEEPEST, NEWEST, WEIGHT = 5, 0.9, 0.1, 0.25, 1.7


def method(**own):
    settings = {"every": EVERY, "share": SHARE, "deepest": DEEPEST, "newest": NEWEST}
    settings |= {"region": "blocks", "newest_weight": WEIGHT, **own}
    return find("pyramidinfer", propagation="everything", **settings)


def drawn(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = LAYERS, TOTAL, 8
    q = torch.randn(4, *shape, generator=draw, dtype=torch.float64)
    return q, torch.randn(2, *shape, generator=draw, dtype=torch.float64)


def share_of(layer):
    return (1 - DEEPEST) * (cos(pi * layer / LAYERS) + 1) / 2 + DEEPEST


def rows_of(held, at, queries, keys, window):
    """Attention of the newest tokens over what is held, a list of {position: weight} per head."""
    found = []
    for head in range(len(queries)):
        for place in range(window):
            asked = at - window + 1 + place
            seen = [p for p in held if p <= asked]
            logits = [float(queries[head, asked] @ keys[head // 2, p]) * 0.5 for p in seen]
            most = max(logits)
            total = sum(exp(one - most) for one in logits)
            weight = 1 + (WEIGHT - 1) * place / max(1, window - 1)
            found.append(
                {p: weight * exp(x - most) / total for p, x in zip(seen, logits, strict=True)}
            )
    return found


def slow(q, k):
    """Positions held by each layer after every generated token."""
    window = 1 + int(NEWEST * PROMPT)
    held, steps, since = [list(range(PROMPT)) for _ in range(LAYERS)], [], PROMPT + window
    for at in range(PROMPT, TOTAL):
        due = at + 1 - since >= EVERY
        since = at + 1 if due else since
        for layer, own in enumerate(held):
            own.append(at)
            if not due:
                continue
            block = range(at + 1 - window - EVERY, at + 1 - window)
            rows = rows_of(own, at, q[:, layer], k[:, layer], window)
            worth = {p: sum(row.get(p, 0.0) for row in rows) for p in block}
            count = max(1, int(EVERY * SHARE * share_of(layer)))
            best = sorted(block, key=lambda p: -worth[p])[:count]
            held[layer] = [p for p in own if p not in block or p in best]
        steps.append([list(own) for own in held])
    return steps


def held(session):
    stores = session.state.stores()
    return [store.dense()[0]["positions"][0].tolist() for store in stores]


def feed(session, q, k, start, stop):
    session.begin(1, stop - start)
    for layer in range(LAYERS):
        queries, keys = q[None, :, layer, start:stop], k[None, :, layer, start:stop]
        session.attend(layer, Call(queries, keys, keys, 0.5))
    session.end()


def test_blocks_are_cut_as_plain_loops_cut_them():
    q, k = drawn()
    session = Session(method(), Keep.parse(1.0), LAYERS)
    feed(session, q, k, 0, PROMPT)
    for at, wanted in zip(range(PROMPT, TOTAL), slow(q, k), strict=True):
        feed(session, q, k, at, at + 1)
        assert held(session) == [[own, own] for own in wanted], at
    counts = [len(layer[0]) for layer in held(session)]
    assert counts[0] > counts[1] > counts[2] > PROMPT


def test_nothing_is_evicted_before_a_whole_block_stands_behind_the_newest():
    q, k = drawn(1)
    session = Session(method(), Keep.parse(1.0), LAYERS)
    feed(session, q, k, 0, PROMPT)
    first = PROMPT + 1 + int(NEWEST * PROMPT) + EVERY
    for at in range(PROMPT, first):
        assert held(session)[2][0] == list(range(at))
        feed(session, q, k, at, at + 1)
    assert len(held(session)[2][0]) == first - EVERY + 1


def test_a_further_turn_stays_and_so_does_what_is_held_before_it():
    q, k = drawn(2)
    session = Session(method(), Keep.parse(1.0), LAYERS)
    feed(session, q, k, 0, PROMPT)
    for at in range(PROMPT, 40):
        feed(session, q, k, at, at + 1)
    before = held(session)
    feed(session, q, k, 40, 44)
    for at in range(44, TOTAL):
        feed(session, q, k, at, at + 1)
    after = held(session)
    for one, other in zip(before, after, strict=True):
        assert [p for p in other[0] if p < 44] == [*one[0], *range(40, 44)]
    assert len(after[2][0]) < len(before[2][0]) + 30


@pytest.mark.parametrize("name", ["snapkv", "knorm", "h2o", "tova"])
def test_any_scorer_cuts_blocks(name):
    q, k = drawn(3)
    own = {"window": 3} if name in ("snapkv", "h2o") else {}
    blocks = {"region": "blocks", "every": EVERY, "share": 0.4, "newest": 2, **own}
    session = Session(find(name, **blocks), Keep.parse(10), LAYERS)
    feed(session, q, k, 0, PROMPT)
    prompt = held(session)
    for at in range(PROMPT, TOTAL):
        feed(session, q, k, at, at + 1)
    for one, other in zip(prompt, held(session), strict=True):
        for before, head in zip(one, other, strict=True):
            assert [p for p in head if p < PROMPT] == before
            answer = [p for p in head if p >= PROMPT]
            blocks_cut = (TOTAL - PROMPT - 3) // EVERY
            assert len(answer) == TOTAL - PROMPT - blocks_cut * (EVERY - 2)


def test_the_prompt_of_a_cascade_stays_while_its_answer_shrinks(llama):
    own = {"decay": 0.3, "min_context": 4, "newest": 0.05, "every": 4}
    cache = kvtrim.Cache(llama, "pyramidinfer", 48, preset="generation", **own)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(60), past_key_values=cache)
        prompt = models.positions(cache)
        for at in range(30):
            llama(models.prompt(1, seed=at), past_key_values=cache)
    after = models.positions(cache)
    assert len(prompt[2][0]) < len(prompt[0][0]) == 60
    for layer, (one, other) in enumerate(zip(prompt, after, strict=True)):
        assert [p for p in other[0] if p < 60] == one[0]
        share = 0.9 * (cos(pi * layer / 3) + 1) / 2 + 0.1
        cut, stay = (30 - 4) // 4, max(1, int(4 * 0.9 * share))
        assert len([p for p in other[0] if p >= 60]) == 30 - cut * (4 - stay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"region": "blocks"}, "set every too"),
        ({"region": "generated", "every": 2, "deepest": 0.5}, "set region=blocks"),
        ({"region": "blocks", "every": 2, "chunks": True}, "region=blocks keeps whole parts"),
        ({"region": "blocks", "every": 2, "newest": -1}, "newest=-1: expected"),
        ({"region": "blocks", "every": 2, "budget": "global"}, "region=blocks and a model-wide"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        find("knorm", **settings)
