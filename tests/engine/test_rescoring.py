"""Methods whose papers cut a prompt once also hold a cache at its budget, step after step."""

import pytest
import torch

import oracles
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import find
from kvtrim.types import LayerView

H, K, D, PROMPT, KEEP = 6, 2, 8, 30, 16
STEPS = [PROMPT, 1, 1, 1, 1, 1, 1, 7, 1, 1, 1, 1]  # the seven are a second turn
METHODS = {
    "curdkv": {"project": None},
    "curdkv-local": {"preset": "authors"},
    "curdkv-exact": {"exact": True},
    "ada-curdkv": {"project": None},
    "ada-curdkv-local": {"preset": "authors"},
    "keydiff": {},
    "keydiff-window": {"window": 3, "sinks": 2},
    "circuitkv": {"window": 4},
    "circuitkv-shared": {"window": 4, "preset": "head-shared", "clearest": 2},
}


def method(name, **settings):
    adaptive = name.startswith("ada-")
    base = "-".join(name.split("-")[: 2 if adaptive else 1])
    chosen = METHODS[name] | settings
    preset = chosen.pop("preset", None)
    return find(find(base, **({"preset": preset} if preset else {})), **chosen)


def tokens(seed=0):
    draw = torch.Generator().manual_seed(seed)
    total = sum(STEPS)
    return [torch.randn(heads, total, D, generator=draw) for heads in (H, K, K)]


def held(session):
    """Positions that each head holds."""
    store = session.state.layers[0].store
    runs = zip(store.start[0].tolist(), store.length[0].tolist(), strict=True)
    positions = store.buffers["positions"].tolist()
    return [positions[first : first + count] for first, count in runs]


def walk(session, q, k, v):
    """What is held before and after each pass, and how many tokens were read by then."""
    read, before = 0, [[] for _ in range(K)]
    for count in STEPS:
        part = slice(read, read + count)
        session.begin(1, count)
        session.attend(0, Call(q[None, :, part], k[None, :, part], v[None, :, part], D**-0.5))
        session.end()
        offered = [[*head, *range(read, read + count)] for head in before]
        read, before = read + count, held(session)
        yield read, offered, before


def scores_alone(policy, q, k, v, read, offered):
    """Scores of the positions offered to each head, which are all seen in one go."""
    chosen = [torch.tensor(head) for head in offered]
    whole = len({tuple(head) for head in offered}) == 1
    groups = [range(K)] if whole else [[head] for head in range(K)]
    scores = {}
    for heads in groups:
        where = chosen[heads[0]]
        queries = [h for h in range(H) if h // (H // K) in heads]
        last = q[queries, read - policy.lookback() : read]
        seen = LayerView(
            index=0,
            layers=1,
            keep=KEEP,
            tokens=read,
            queries=last[None],
            keys=k[list(heads)][None, :, where],
            values=v[list(heads)][None, :, where],
            positions=where.int().expand(1, len(heads), -1),
            scale=D**-0.5,
        )
        scores |= dict(zip(heads, policy.score(seen)[0].tolist(), strict=True))
    return [scores[head] for head in range(K)]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_every_cut_keeps_the_best_of_what_was_held_and_read(name, every):
    chosen = method(name, every=every)
    policy, q_k_v = chosen.policy, tokens()
    session = Session(chosen, Keep.parse(KEEP), layers=1)
    sinks, recent = policy.sinks, policy.recent(KEEP)
    cuts = 0
    for read, offered, kept in walk(session, *q_k_v):
        if kept == offered:
            assert sum(map(len, kept)) < K * (KEEP + every)
            continue
        cuts += 1
        assert sum(map(len, kept)) == K * KEEP
        scores = scores_alone(policy, *q_k_v, read, offered)
        for head, positions in enumerate(kept):
            count, slots = len(positions), len(offered[head])
            free = scores[head][sinks : slots - recent]
            best = oracles.top(free, count - sinks - recent)
            slots = [*range(sinks), *(i + sinks for i in best), *range(slots - recent, slots)]
            assert positions == [offered[head][slot] for slot in slots]
    assert cuts >= len(STEPS) // every - 1


def test_heads_that_share_their_set_share_it_for_good():
    session = Session(method("circuitkv", every=1), Keep.parse(KEEP), layers=1)
    for _, _, kept in walk(session, *tokens()):
        assert kept[0] == kept[1]


def test_a_head_never_falls_below_its_safe_share():
    session = Session(method("ada-curdkv", every=1, floor=0.5), Keep.parse(KEEP), layers=1)
    q, k, v = tokens()
    draw = torch.Generator().manual_seed(1)
    k[0] *= torch.rand(k.shape[1], 1, generator=draw) ** 4  # one head with few large keys
    for _, _, kept in walk(session, q, k, v):
        assert min(map(len, kept)) >= KEEP // 2
        assert kept[0][:4] == kept[1][:4] == [0, 1, 2, 3]


def test_circuitkv_works_with_heads_that_compete():
    chosen = method("circuitkv", every=1, budget="per-head", floor=0.0)
    session = Session(chosen, Keep.parse(KEEP), layers=1)
    for read, _, kept in walk(session, *tokens()):
        assert sum(map(len, kept)) == K * KEEP
        for head in kept:
            assert {0, 1, 2, 3, *range(read - 4, read)} <= set(head)
