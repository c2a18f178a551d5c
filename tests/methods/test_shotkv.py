"""ShotKV: recorded cases, worked numbers, and plain loops."""

import dataclasses
import itertools
import math

import pytest
import torch

import golden
import kvtrim
import oracles
from kvtrim.engine.layer import Call
from kvtrim.engine.session import Session
from kvtrim.errors import UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.policies.ops import column_sums
from kvtrim.methods.policies.shotkv import ShotKV
from kvtrim.methods.selection import select
from kvtrim.methods.settings import find
from kvtrim.methods.unit import Shot
from kvtrim.prompts.spans import as_spans
from views import view

CASES = golden.cases("shotkv")


def kind(wanted):
    chosen = [case for case in CASES if case.params["kind"] == wanted]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


def settings(params):
    own = {
        "fill": params["overflow"],
        "count_fixed": params["count_fixed"],
        "self_attention": params["self_attention"],
    }
    if params["queries"] != "all":
        own |= {"observers": "last_w", "window": params["queries"]}
    return own


def spans_of(case):
    return {"shots": [tuple(span) for span in case.tensor("spans").tolist()]}


# Recorded cases


@kind("prefill")
def test_recorded_prompts(case):
    params, shots = case.params, spans_of(case)
    for keep in (params["ratio"], params["budget_tokens"]):
        kept = kvtrim.select("shotkv", *case.qkv(), keep=keep, spans=shots, **settings(params))
        assert not case.differing_heads(kept[0])
        assert kept[0][0].tolist() == kept[0][1].tolist()


@kind("prefill")
def test_recorded_token_scores(case):
    (q,), (k,), _ = case.qkv()
    method = find("shotkv", **settings(case.params))
    seen = view(q, k)
    if method.policy.observes(decoding=False):
        seen = dataclasses.replace(seen, carried=method.policy.observe(seen))
    want = case.tensor("token_scores")
    torch.testing.assert_close(method.policy.score(seen)[0, 0], want, rtol=1e-4, atol=1e-5)


@kind("decode")
def test_recorded_generated_tokens(case):
    params = case.params
    (q,), (k,), (v,) = case.qkv()
    method = find("shotkv", share=params["ratio_decode"], **settings(params))
    session = Session(method, Keep.parse(params["ratio_prefill"]), 1, spans=spans_of(case))
    prompt, n = params["prefill"], q.shape[1]
    history = case.tensor("decode_history").split(case.tensor("decode_history_lens").tolist())
    read(session, q, k, v, 0, prompt)
    assert held(session) == [case.tensor("kept_prefill").tolist()] * 2
    for step, at in enumerate(range(prompt, n)):
        read(session, q, k, v, at, at + 1)
        for head in held(session):
            assert [p for p in head if p < prompt] == case.tensor("kept_prefill").tolist()
            assert [p for p in head if p >= prompt] == history[step].tolist(), step
    assert [p for p in held(session)[0] if p >= prompt] == case.tensor("kept_decode").tolist()


def test_the_share_of_generated_tokens_is_the_prompts_unless_told_otherwise():
    for case in CASES:
        params = case.params
        if params["kind"] == "decode" and params["ratio_decode"] == params["ratio_prefill"]:
            (q,), (k,), (v,) = case.qkv()
            session = Session(
                find("shotkv", **settings(params)),
                Keep.parse(int(params["ratio_prefill"] * params["prefill"])),
                1,
                spans=spans_of(case),
            )
            read(session, q, k, v, 0, params["prefill"])
            for at in range(params["prefill"], q.shape[1]):
                read(session, q, k, v, at, at + 1)
            now = [p for p in held(session)[0] if p >= params["prefill"]]
            assert now == case.tensor("kept_decode").tolist()


# Worked numbers of the specification

SHOTS = {"shots": [(4, 10), (10, 14), (14, 20), (20, 24)]}
A, B, C, D = (set(range(*span)) for span in SHOTS["shots"])
FIXED = {0, 1, 2, 3}


def chosen(room, **options):
    """What of 24 tokens with shots of mean .5, .8, .6, .3 stays."""
    values = torch.zeros(1, 1, 24)
    for shot, mean in zip((A, B, C, D), (0.5, 0.8, 0.6, 0.3), strict=True):
        values[0, 0, sorted(shot)] = mean
    unit = Shot(**options)
    positions = torch.arange(24).expand(1, 1, 24)
    members = unit.members([as_spans(SHOTS)], positions)
    kept = select(values, torch.tensor([[room]]), 24, unit=unit, members=members)
    return set(kept.slots[0, 0].tolist())


def test_whole_shots_fill_the_room_beside_the_fixed_text():
    assert chosen(12) == FIXED | B
    assert chosen(12, fill="skip") == FIXED | B | D
    assert chosen(12, count_fixed=False) == FIXED | B | C


def test_the_best_shots_stay_over_budget_if_asked():
    assert chosen(5) == FIXED
    assert chosen(5, min_shots=1) == FIXED | B
    assert chosen(12, min_shots=2) == FIXED | B | C
    assert chosen(2) == FIXED


def test_room_for_every_shot_keeps_every_shot():
    assert chosen(24) == set(range(24))


def test_repeating_a_shots_tokens_leaves_its_rank():
    unit = Shot(count_fixed=False)
    values = torch.tensor([[[0.4, 0.4, 0.5, 0.5, 0.3, 0.3]]])
    for times in (1, 2, 5):
        long = torch.cat([values[..., :2].repeat(1, 1, times), values[..., 2:]], dim=-1)
        end = 2 * times
        shots = as_spans({"shots": [(0, end), (end, end + 2), (end + 2, end + 4)]})
        members = unit.members([shots], torch.arange(end + 4).expand(1, 1, end + 4))
        kept = select(long, torch.tensor([[2]]), end + 4, unit=unit, members=members)
        assert kept.slots[0, 0].tolist() == [end, end + 1]


def test_a_shot_of_two_ranges_stays_as_a_whole():
    unit = Shot()
    shots = as_spans({"shots": [[(1, 3), (6, 8)], (3, 6)]})
    members = unit.members([shots], torch.arange(9).expand(1, 1, 9))
    assert members[0, 0].tolist() == [-1, 0, 0, 1, 1, 1, 0, 0, -1]
    scores = torch.tensor([[[0, 3.0, 3, 1, 1, 1, 0, 0, 0]]])
    kept = select(scores, torch.tensor([[6]]), 9, unit=unit, members=members)
    assert kept.slots[0, 0].tolist() == [0, 1, 2, 6, 7, 8]
    lower = torch.tensor([[[0, 1.9, 1.9, 1, 1, 1, 0, 0, 0]]])
    kept = select(lower, torch.tensor([[6]]), 9, unit=unit, members=members)
    assert kept.slots[0, 0].tolist() == [0, 3, 4, 5, 8]


@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        (0.5, [1, 1, 2, 2, 3, 3]),
        (1.0, [1, 2, 3, 4, 5, 6]),
        (0.0, [1, 1, 1, 1, 1, 1]),
        (0.1, [1] * 10 + [2]),
        (0.3, [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]),
    ],
)
def test_the_store_of_generated_tokens_grows_with_what_was_generated(share, sizes):
    session = started(share=share)
    q, k, v = qkv(20 + len(sizes))
    for step, size in enumerate(sizes):
        read(session, q, k, v, 20 + step, 21 + step)
        assert all(len([p for p in head if p >= 20]) == size for head in held(session))


def test_evicting_every_few_steps_comes_to_the_same_size():
    session = started(share=0.5, every=4)
    q, k, v = qkv(32)
    sizes = []
    for at in range(20, 32):
        read(session, q, k, v, at, at + 1)
        sizes.append(len([p for p in held(session)[0] if p >= 20]))
    assert sizes == [1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6]


# Plain loops


def qkv(n, heads=6, kv_heads=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    make = [torch.randn(count, n, 8, generator=draw) for count in (heads, kv_heads, kv_heads)]
    return [tensor * 1.5 for tensor in make]


def read(session, q, k, v, start, end):
    """One pass over a stretch of the tokens."""
    q, k, v = (tensor[None, :, start:end] for tensor in (q, k, v))
    session.begin(1, end - start)
    session.attend(0, Call(q, k, v, q.shape[-1] ** -0.5))
    session.end()


def held(session, row=0, layer=0):
    """Positions held, one list per head."""
    store = session.state.layers[layer].store
    runs = zip(store.start[row].tolist(), store.length[row].tolist(), strict=True)
    where = store.buffers["positions"].tolist()
    return [where[first : first + count] for first, count in runs]


def started(keep=10, spans=None, n=20, **options):
    """A session that has read a prompt."""
    session = Session(find("shotkv", **options), Keep.parse(keep), 1, spans=spans)
    read(session, *qkv(40), 0, n)
    return session


def received(q, k, observers, own=False):
    """acc[t]: attention from later observers, over all heads, in float64 loops."""
    n = q.shape[1]
    weights = oracles.window_weights(q, k, n, q.shape[-1] ** -0.5)
    acc = [0.0] * n
    for t, i in itertools.product(range(n), observers):
        if i > t or (own and i == t):
            acc[t] += float(weights[:, i, t].sum())
    return acc


def kept_by_hand(acc, shots, room, fill="stop", count_fixed=True):
    """Algorithm 1 with lists."""
    n = len(acc)
    of = {t: s for s, ranges in enumerate(shots) for a, b in ranges for t in range(a, b)}
    fixed = [t for t in range(n) if t not in of]
    tokens = [[t for t in range(n) if of.get(t) == s] for s in range(len(shots))]
    if count_fixed and len(fixed) > room:
        room = room * (n - len(fixed)) // n
    elif count_fixed:
        room -= len(fixed)
    ranking = sorted(
        range(len(shots)), key=lambda s: (-sum(acc[t] for t in tokens[s]) / len(tokens[s]), s)
    )
    kept = list(fixed)
    for s in ranking:
        if len(tokens[s]) <= room:
            kept += tokens[s]
            room -= len(tokens[s])
        elif fill == "stop":
            break
    return sorted(kept)


PARTS = [[(3, 9)], [(9, 12), (30, 33)], [(12, 20)], [(20, 24)], [(24, 30)]]


@pytest.mark.parametrize("fill", ["stop", "skip"])
@pytest.mark.parametrize("count_fixed", [True, False])
@pytest.mark.parametrize("observers", ["all", "last_w", "question"])
def test_prompts_equal_the_loops(fill, count_fixed, observers):
    q, k, v = qkv(40, seed=4)
    spans = {"shots": PARTS, "question": [(35, 38)]}
    who = {"all": range(40), "last_w": range(33, 40), "question": range(35, 38)}[observers]
    for own in (False, True):
        acc = received(q, k, who, own)
        for keep in (5, 9, 10, 18, 25, 33, 39):
            kept = kvtrim.select(
                "shotkv", q, k, v, keep=keep, spans=spans, fill=fill, count_fixed=count_fixed,
                observers=observers, window=7, self_attention=own,
            )  # fmt: skip
            want = kept_by_hand(acc, PARTS, keep, fill, count_fixed)
            assert [head.tolist() for head in kept[0]] == [want, want]


def test_generated_tokens_equal_the_loops():
    q, k, v = qkv(40, seed=5)
    for accumulate, newest in itertools.product((False, True), (0, 1, 2)):
        session = started_with(q, k, v, share=0.4, accumulate=accumulate, newest=newest)
        kept = held(session)[0]
        store, total = [], {}
        for at in range(24, 40):
            store.append(at)
            read(session, q, k, v, at, at + 1)
            weight = weights_of(q, k, at, kept + store)
            for slot in store:
                total[slot] = (total.get(slot, 0) if accumulate else 0) + weight[slot]
            most = max(1, math.ceil(0.4 * (at - 23) - 1e-9))
            while len(store) > max(most, newest):
                rivals = store[: len(store) - newest]
                store.remove(min(rivals, key=lambda slot: (total[slot], -slot)))
            assert held(session) == [kept + store] * 2


def started_with(q, k, v, **options):
    session = Session(find("shotkv", **options), Keep.parse(12), 1, spans={"shots": [(2, 9)]})
    read(session, q, k, v, 0, 24)
    return session


def weights_of(q, k, at, slots):
    """The query's attention over these slots, summed over heads."""
    total = dict.fromkeys(slots, 0.0)
    for h in range(len(q)):
        logits = torch.stack([q[h, at].double() @ k[h // 3, s].double() for s in slots]) * 8**-0.5
        for slot, weight in zip(slots, logits.softmax(0).tolist(), strict=True):
            total[slot] += weight
    return total


def test_one_key_for_all_heads_or_one_each_keeps_the_same_shots():
    q, k, v = qkv(40, seed=6)
    spans = {"shots": PARTS}
    grouped = kvtrim.select("shotkv", q, k, v, keep=25, spans=spans)
    each = [t.repeat_interleave(3, dim=0) for t in (k, v)]
    alone = kvtrim.select("shotkv", q, *each, keep=25, spans=spans)
    assert [h.tolist() for h in grouped[0]] * 3 == [h.tolist() for h in alone[0]]


@pytest.mark.parametrize("name", ["shotkv", "random-shot"])
def test_a_shot_is_never_split(name):
    for seed in range(12):
        q, k, v = qkv(40, seed=seed)
        for keep in range(6, 40, 3):
            kept = kvtrim.select(name, q, k, v, keep=keep, spans={"shots": PARTS}, fill="skip")
            for head in kept[0]:
                for ranges in PARTS:
                    tokens = {t for a, b in ranges for t in range(a, b)}
                    assert len(tokens & set(head.tolist())) in (0, len(tokens))


def test_all_of_the_prompt_is_no_eviction_ever():
    q, k, v = qkv(40)
    session = Session(find("shotkv"), Keep.parse(1.0), 1, spans={"shots": PARTS[:1]})
    read(session, q, k, v, 0, 24)
    for at in range(24, 40):
        read(session, q, k, v, at, at + 1)
    assert held(session) == [list(range(40))] * 2


def test_random_shots_come_in_another_order_for_every_seed_and_layer():
    q, k, v = qkv(40)
    spans = {"shots": [(i, i + 4) for i in range(0, 40, 4)]}

    def first(seed):
        kept = kvtrim.select(
            "random-shot", [q] * 4, [k] * 4, [v] * 4, keep=4, spans=spans, seed=seed
        )
        return [int(layer[0][0]) for layer in kept]

    assert first(0) == first(0) != first(1)
    everywhere = [shot for seed in range(80) for shot in first(seed)]
    counts = [everywhere.count(start) for start in range(0, 40, 4)]
    assert min(counts) > 12 and max(counts) < 60, counts


def test_long_and_short_shots_are_as_likely_to_come_first():
    q, k, v = qkv(40)
    spans = {"shots": [(0, 1), (1, 39), (39, 40)]}
    wins = 0
    for seed in range(60):
        kept = kvtrim.select(
            "random-shot", q, k, v, keep=38, spans=spans, seed=seed, min_shots=1, fill="stop"
        )
        wins += len(kept[0][0]) == 38
    assert 8 < wins < 34, wins


def test_a_position_draws_the_same_whatever_else_is_held():
    q, k, _ = qkv(40)
    held_now = torch.tensor([3, 4, 17, 30, 39]).int().expand(1, 2, 5)
    all_of_them = find("random-shot").policy.score(view(q, k))
    few = find("random-shot").policy.score(view(q, k[:, :5], positions=held_now, tokens=60))
    assert torch.equal(few, all_of_them.gather(2, held_now.long()))


# Without named parts, with turns, with parameters that make no sense


def test_without_named_parts_runs_of_tokens_are_the_shots():
    q, k, v = qkv(40, seed=7)
    acc = received(q, k, range(40))
    for run in (4, 7, 16):
        runs = [[(i, min(i + run, 40))] for i in range(0, 40, run)]
        kept = kvtrim.select("shotkv", q, k, v, keep=20, run=run)
        assert kept[0][0].tolist() == kept_by_hand(acc, runs, 20)


def test_sentences_are_the_shots_where_no_shots_are_named():
    q, k, v = qkv(40, seed=8)
    named = kvtrim.select("shotkv", q, k, v, keep=25, spans={"shots": PARTS})
    for extra in ({}, {"shots": []}, {"question": [(38, 40)]}):
        sentences = kvtrim.select("shotkv", q, k, v, keep=25, spans={"sentences": PARTS, **extra})
        assert sentences[0][0].tolist() == named[0][0].tolist()


def test_a_further_turn_stays_and_so_does_the_answer_before_it():
    q, k, v = qkv(40)
    session = started(share=0.5)
    for at in range(20, 26):
        read(session, q, k, v, at, at + 1)
    answer = held(session)[0]
    read(session, q, k, v, 26, 30)
    assert held(session)[0] == [*answer, 26, 27, 28, 29]
    for step, at in enumerate(range(30, 36)):
        read(session, q, k, v, at, at + 1)
        assert held(session)[0][: len(answer) + 4] == [*answer, 26, 27, 28, 29]
        assert len(held(session)[0]) == len(answer) + 4 + (step + 2) // 2


def test_single_tokens_that_were_announced_are_no_generated_ones():
    q, k, v = qkv(40)
    session = started(share=0.5)
    session.state.expected = 24
    for at in range(20, 24):
        read(session, q, k, v, at, at + 1)
    assert held(session)[0][-4:] == [20, 21, 22, 23]
    for at in range(24, 28):
        read(session, q, k, v, at, at + 1)
    assert len([p for p in held(session)[0] if p >= 24]) == 2


def test_a_budget_below_one_shot_keeps_the_fixed_text_alone():
    q, k, v = qkv(40)
    assert kvtrim.select("shotkv", q, k, v, keep=5, run=8)[0][0].tolist() == []
    kept = kvtrim.select("shotkv", q, k, v, keep=5, spans={"shots": [(2, 40)]})
    assert kept[0][0].tolist() == [0, 1]
    session = started(keep=5)
    assert held(session) == [[], []]
    read(session, q, k, v, 20, 21)
    assert held(session) == [[20], [20]]


def test_fixed_text_above_the_budget_leaves_the_shots_their_share():
    """Where the text outside the shots takes it all, budgets still differ, and shots survive."""
    q, k, v = qkv(40)
    shots = [(at, at + 2) for at in range(28, 40, 2)]
    held = {
        keep: kvtrim.select("shotkv", q, k, v, keep=keep, spans={"shots": shots})[0][0].tolist()
        for keep in (0.2, 0.4, 0.6)
    }
    assert all(set(range(28)) <= set(kept) for kept in held.values())
    assert [len(kept) - 28 for kept in held.values()] == [2, 4, 6], "a share of twelve, in pairs"


def test_the_generated_region_works_with_other_methods():
    q, k, v = qkv(40)
    for name, own in {"h2o": {}, "knorm": {}, "snapkv": {"window": 3}, "tova": {}}.items():
        method = find(name, region="generated", every=1, share=0.5, **own)
        session = Session(method, Keep.parse(10), 1)
        read(session, q, k, v, 0, 20)
        prompt = held(session)
        for at in range(20, 40):
            read(session, q, k, v, at, at + 1)
        assert [[p for p in head if p < 20] for head in held(session)] == prompt
        assert all(len([p for p in head if p >= 20]) == 10 for head in held(session))


def test_presets_and_parameters():
    assert find("shotkv", preset="prefill-only").schedule.every is None
    assert str(find("shotkv").schedule) == "end of prompt; generated: every step"
    assert find("snapkv", unit="shot", fill="skip").unit == Shot(fill="skip")
    with pytest.raises(UsageError, match="set region=generated"):
        find("snapkv", share=0.5)
    with pytest.raises(UsageError, match="ahead"):
        find("streaming-llm", preset="bounded", region="generated")
    with pytest.raises(UsageError, match=r"share=2.0: expected float .0 to 1"):
        find("shotkv", share=2.0)
    with pytest.raises(UsageError, match=r"run=0: expected int .1 or more"):
        Shot(run=0)
    q, k, v = qkv(40)
    with pytest.raises(UsageError, match="where the question is"):
        kvtrim.select("shotkv", q, k, v, keep=20, observers="question")


def test_column_sums_of_some_queries_and_without_their_own_slots():
    q, k, _ = qkv(40)
    dense = oracles.window_weights(q, k, 40, 8**-0.5)
    for start in (0, 1, 39):
        mask = (torch.arange(40) >= start)[None]
        got = column_sums(view(q, k), mask, own=False)[0]
        bare = dense.clone()
        bare[:, range(40), range(40)] = 0
        torch.testing.assert_close(got, bare[:, start:].sum(1).float(), rtol=1e-4, atol=1e-5)


def test_shotkv_says_what_it_lacks():
    q, k, _ = qkv(20)
    with pytest.raises(TypeError, match="call observe first"):
        ShotKV().score(view(q, k))
