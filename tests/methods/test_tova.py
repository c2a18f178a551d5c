"""TOVA: worked examples, and what holds after every step."""

import pytest
import torch

import golden
import kvtrim
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.methods.keep import Keep
from kvtrim.methods.settings import find

ROWS = torch.tensor([[0.5, 0.1, 0.2, 0.05, 0.15], [0.1, 0.3, 0.2, 0.3, 0.1]])


def attention_is(rows):
    """Queries and keys [heads, n, D] for which the newest token attends like this."""
    heads, n = rows.shape
    queries = torch.zeros(heads, n, heads)
    queries[:, -1] = torch.eye(heads)
    return queries, rows.log().T[None]


def decode(method, keep, q, k, prompt):
    """The store's positions after the prompt and after every token."""
    session = Session(method, Keep.parse(keep), layers=1)
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, k.shape[1]))]:
        part = slice(start, end)
        session.begin(1, end - start)
        queries, keys = q[None, :, part], k[None, :, part]
        session.attend(0, Call(queries, keys, keys, q.shape[-1] ** -0.5))
        session.end()
        yield session.state.layers[0].store.dense()[0]["positions"][0].tolist()


@pytest.fixture
def qk():
    draw = torch.Generator().manual_seed(2)
    return torch.randn(6, 50, 8, generator=draw), torch.randn(2, 50, 8, generator=draw)


@pytest.mark.parametrize(("keep", "want"), [(4, [0, 1, 2, 3]), (3, [0, 1, 2])])
def test_the_slot_with_the_least_attention_goes_first_even_the_newest(keep, want):
    q, k = attention_is(ROWS)
    assert kvtrim.select("tova", q, k, k, keep=keep, scale=1.0)[0][0].tolist() == want


def test_the_newest_can_be_protected():
    q, k = attention_is(ROWS)
    for settings in ({"protect_last": 1}, {"preset": "kvpress"}):
        kept = kvtrim.select("tova", q, k, k, keep=4, scale=1.0, **settings)
        assert kept[0][0].tolist() == [0, 1, 2, 4]


def test_each_step_drops_at_most_one_and_all_heads_agree(qk):
    before = None
    for at, heads in enumerate(decode(find("tova"), 16, *qk, prompt=30)):
        assert heads[0] == heads[1], "one set per layer"
        assert len(heads[0]) == 16
        assert before is None or set(heads[0]) <= {*before, 29 + at}
        before = heads[0]


def test_heads_may_choose_alone(qk):
    *_, heads = decode(find("tova", per_head=True), 16, *qk, prompt=30)
    assert heads[0] != heads[1] and [len(head) for head in heads] == [16, 16]


def test_a_state_larger_than_the_text_is_the_full_cache(qk):
    for heads in decode(find("tova"), 50, *qk, prompt=30):
        assert heads[0] == list(range(len(heads[0])))
    assert len(heads[0]) == 50


@pytest.mark.parametrize("case", golden.cases("tova"), ids=lambda case: case.id)
def test_the_kvpress_preset_keeps_what_kvpress_kept(case):
    (layer,) = kvtrim.select("tova", *case.qkv(), keep=case.params["n_kept"], preset="kvpress")
    assert not case.differing_heads(layer)
