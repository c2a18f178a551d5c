"""Echo: every token is scored when it is read, and the whole model shares one pool."""

import dataclasses
import math

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import UsageError
from kvtrim.hf.models import fingerprint
from kvtrim.hf.replay import record
from kvtrim.methods import echo_tables
from kvtrim.methods.echo_tables import EchoTable, Linear
from kvtrim.methods.settings import find
from small import small

N, KEEP, SINKS, BEHIND = 48, 20, 4, 64
TABLE = small("echo")
LOOKS = find("echo").policy.looks


def foretold(model, ids):
    """Scores of all tokens of one pass with nothing evicted, [L][K][n], number by number."""
    table = echo_tables.read(TABLE["table"])
    found = []
    for layer, call in enumerate(record(model, ids).calls):
        weight, bias = table.weight[layer].double(), table.bias[layer].double()
        states = call.hidden[0].double()
        found.append(
            [
                [float((weight[head] @ state + bias[head]).exp()) for state in states]
                for head in range(len(weight))
            ]
        )
    return found


def best_of_all(scores, keep, recent=0, least=0.0):
    """Sinks, the newest, and the best of the others over the whole model."""
    n, heads = (
        len(scores[0][0]),
        [(a, b) for a in range(len(scores)) for b in range(len(scores[0]))],
    )
    listed = sorted(
        (-scores[layer][head][at], layer, head, at)
        for layer, head in heads
        for at in range(SINKS, n - recent)
        if scores[layer][head][at] >= least
    )
    chosen = {entry[1:] for entry in listed[: len(heads) * (keep - SINKS - recent)]}
    always = [*range(SINKS), *range(n - recent, n)]
    return [
        [
            sorted([*always, *(at for one, other, at in chosen if (one, other) == (layer, head))])
            for head in range(len(scores[0]))
        ]
        for layer in range(len(scores))
    ]


def read(model, cache, ids, *widths):
    with torch.no_grad(), kvtrim.attach(model):
        for part in ids.split(list(widths) or [ids.shape[1]], dim=1):
            model(part, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def with_second(tmp_path_factory):
    """A table with every map, of the tiny model."""
    draw = torch.Generator().manual_seed(5)

    def numbers(*shape):
        return torch.randn(*shape, generator=draw)

    seconds = [Linear(numbers(3, 2, count), numbers(3, 2)) for count in (6, 10)]
    first = numbers(3, 2, 48) / 8, numbers(3, 2), numbers(3, 2, 8) / 4
    path = tmp_path_factory.mktemp("table") / "all.safetensors"
    echo_tables.write(path, EchoTable(*first, *seconds), {})
    return {"table": str(path)}


def turned_on(model, vector, by):
    """A vector at a later position, pair by pair."""
    frequencies, half = model.model.rotary_emb.inv_freq.tolist(), len(vector) // 2
    found = list(vector)
    for pair, frequency in enumerate(frequencies):
        one, other, angle = vector[pair], vector[pair + half], by * frequency
        found[pair] = one * math.cos(angle) - other * math.sin(angle)
        found[pair + half] = other * math.cos(angle) + one * math.sin(angle)
    return found


def at_the_end(model, ids, table, asked):
    """Scores of a complete prompt by both maps, number by number: first ones, then second ones."""
    table, n = echo_tables.read(table), ids.shape[1]
    firsts, seconds = [], []
    for layer, call in enumerate(record(model, ids).calls):
        hidden, keys, values = (
            x[0].double().tolist() for x in (call.hidden, call.keys, call.values)
        )
        said, sizes = [], []
        for at in range(n):
            own = [math.hypot(*keys[head][at]) for head in range(2)]
            own += [math.hypot(*values[head][at]) for head in range(2)]
            sizes.append(own + [math.log(x) for x in own])
            read = torch.tensor([*hidden[at], *sizes[-1]], dtype=torch.float64)
            weight = torch.cat(
                [table.weight[layer].double(), table.lengths[layer].double()], dim=1
            )
            said.append((weight @ read + table.bias[layer].double()).tolist())
        firsts.append([[math.exp(own[head]) for own in said] for head in range(2)])
        most, mean = ([[0.0] * n for _ in range(2)] for _ in range(2))
        queries = call.queries[0].double().tolist()
        chosen = sorted({-(-i * n // asked) for i in range(asked)}) if asked < n else range(n)
        for head in range(6 if asked else 0):
            for at in chosen:
                query = turned_on(model, queries[head][at], n + BEHIND - at)
                logits = [
                    call.scale * sum(a * b for a, b in zip(query, key, strict=True))
                    for key in keys[head // 3]
                ]
                total = sum(map(math.exp, logits))
                for slot, logit in enumerate(logits):
                    weight = math.exp(logit) / total
                    most[head // 3][slot] = max(most[head // 3][slot], weight)
                    mean[head // 3][slot] += weight / (3 * len(chosen))
        second = table.asked if asked else table.end
        found = [[], []]
        for at in range(n):
            read = [*said[at], *(math.exp(-(n - 1 - at) / x) for x in (16, 64, 256))]
            read.append(math.exp(-at / 32))
            if asked:
                read += [math.log(most[head][at] + 1e-4) for head in range(2)]
                read += [math.log(mean[head][at] * n + 1e-4) for head in range(2)]
            weight, read = second.weight[layer].double(), torch.tensor(read, dtype=torch.float64)
            for head, score in enumerate((weight @ read + second.bias[layer].double()).tolist()):
                found[head].append(math.exp(score) + (LOOKS * most[head][at] if asked else 0))
        seconds.append(found)
    return firsts, seconds


@pytest.mark.parametrize(("asked", "each"), [(0, 0), (30, 10), (96, 32), (600, 200)])
@pytest.mark.parametrize("widths", [(N,), (5, 20, 23)])
def test_a_cut_at_the_end_knows_where_that_is_and_what_is_looked_at(
    llama, with_second, asked, each, widths
):
    ids = models.prompt(N)
    _, wanted = at_the_end(llama, ids, with_second["table"], each)
    for refit in ("none", "values"):
        settings = {"asked": asked, "refit": refit, "prompt_tokens": N, **with_second}
        cache = kvtrim.Cache(llama, "echo", KEEP, **settings)
        assert models.positions(read(llama, cache, ids, *widths)) == best_of_all(wanted, KEEP)


def test_the_last_queries_vote_beside_what_is_foretold(llama):
    """The largest weight of any of them, over a group, in the neighbourhood of an entry."""
    ids, window, kernel = models.prompt(N), 5, 7
    scores, recording = foretold(llama, ids), record(llama, ids)
    for layer, call in enumerate(recording.calls):
        for head in range(6):
            for at in range(N - window, N):
                query = call.queries[0, head, at].double()
                logits = call.keys[0, head // 3, : at + 1].double() @ query * call.scale
                weights = logits.softmax(0).tolist()[: N - window]
                for slot, own in enumerate(scores[layer][head // 3][: N - window]):
                    near = weights[max(0, slot - kernel // 2) : slot + kernel // 2 + 1]
                    own = own if isinstance(own, list) else [own, 0.0]
                    scores[layer][head // 3][slot] = [own[0], max(own[1], *near)]
    scores = [
        [[sum(own) if isinstance(own, list) else own for own in head] for head in layer]
        for layer in scores
    ]
    settings = {"window": window, "kernel": kernel, **TABLE}
    cache = read(llama, kvtrim.Cache(llama, "echo", KEEP, **settings), ids)
    wanted = best_of_all(scores, KEEP, recent=window)
    assert models.positions(cache) == wanted != best_of_all(foretold(llama, ids), KEEP)


def test_a_window_longer_than_the_prompt_asks_what_there_is(llama):
    ids = models.prompt(N)[:, :20]
    kept = [
        models.positions(read(llama, kvtrim.Cache(llama, "echo", 14, window=count, **TABLE), ids))
        for count in (19, 300)
    ]
    assert kept[0] == kept[1]


def test_cuts_before_the_end_and_after_it_go_by_what_each_token_was_worth_when_read(
    llama, with_second
):
    ids = models.prompt(N)
    first, second = at_the_end(llama, ids, with_second["table"], 32)
    assert best_of_all(first, KEEP) != best_of_all(second, KEEP)
    cache = kvtrim.Cache(llama, "echo", KEEP, chunks=True, prompt_tokens=N, **with_second)
    assert models.positions(read(llama, cache, ids, 20, 28)) == best_of_all(first, KEEP)


def test_query_heads_with_entries_of_their_own_have_their_groups_second_scores(llama, with_second):
    settings = {"granularity": "query", "budget": "uniform", "asked": 0, **with_second}
    cache = kvtrim.Cache(llama, "echo", KEEP, **settings)
    _, wanted = at_the_end(llama, models.prompt(N), with_second["table"], 0)
    for layer, heads in enumerate(models.positions(read(llama, cache, models.prompt(N)))):
        assert heads[0] == heads[1] == heads[2] and heads[3] == heads[4] == heads[5]
        for head in range(2):
            best = sorted(range(SINKS, N), key=lambda at: -wanted[layer][head][at])[: KEEP - SINKS]
            assert heads[3 * head][SINKS:] == sorted(best)


def test_the_best_of_the_whole_model_stay(llama):
    ids = models.prompt(N)
    cache = read(llama, kvtrim.Cache(llama, "echo", KEEP, **TABLE), ids)
    assert models.positions(cache) == best_of_all(foretold(llama, ids), KEEP)
    assert sum(int(heads.sum()) for heads in cache.entries()) == KEEP * 6
    assert all("carried" not in store.buffers for store in cache.session.state.stores())


def test_one_pass_over_the_model_is_all_it_takes(llama):
    passes = []
    handle = llama.model.register_forward_hook(lambda *_: passes.append(1))
    read(llama, kvtrim.Cache(llama, "echo", KEEP, **TABLE), models.prompt(N))
    handle.remove()
    assert len(passes) == 1


@pytest.mark.parametrize("widths", [(5, 20, 23), (1, 47), (30, 18)])
def test_the_size_of_chunks_changes_nothing_where_the_prompt_is_cut_at_its_end(llama, widths):
    ids = models.prompt(N)
    cache = kvtrim.Cache(llama, "echo", KEEP, prompt_tokens=N, **TABLE)
    assert models.positions(read(llama, cache, ids, *widths)) == best_of_all(
        foretold(llama, ids), KEEP
    )


def noted(cache):
    """A dict that fills with what is foretold of every token: (layer, head, position) to score."""
    scores, policy = {}, cache.session.method.policy
    read_so_far = {}

    @dataclasses.dataclass(frozen=True)
    class Noting(type(policy)):
        def foresee(self, index, hidden, keys, values):
            found = policy.foresee(index, hidden, keys, values)
            first = read_so_far.get(index, 0)
            for head, own in enumerate(found[0].tolist()):
                scores.update({(index, head, first + i): x for i, x in enumerate(own)})
            read_so_far[index] = first + hidden.shape[1]
            return found

    own = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    cache.session.method = dataclasses.replace(cache.session.method, policy=Noting(**own))
    return scores


def nested(scores, layers=3, heads=2):
    count = len(scores) // (layers * heads)
    return [
        [[scores[layer, head, at] for at in range(count)] for head in range(heads)]
        for layer in range(layers)
    ]


def test_cut_after_every_chunk_the_best_of_what_was_foretold_stay(llama):
    """One pool over the model: nothing that left could have come back."""
    ids = models.prompt(N)
    cache = kvtrim.Cache(llama, "echo", KEEP, chunks=True, prompt_tokens=N, **TABLE)
    scores, most = noted(cache), []
    with torch.no_grad(), kvtrim.attach(llama):
        for part in ids.split(8, dim=1):
            llama(part, past_key_values=cache)
            most.append(sum(int(heads.sum()) for heads in cache.entries()))
    assert max(most) <= KEEP * 6
    assert models.positions(cache) == best_of_all(nested(scores), KEEP)


@pytest.mark.parametrize("chunks", [False, True])
def test_while_generating_the_budget_holds_and_the_newest_stay(llama, chunks):
    ids, every, newest = models.prompt(N + 24), 6, 5
    settings = {"chunks": chunks, "every": every, "local": newest, **TABLE}
    cache = kvtrim.Cache(llama, "echo", KEEP, prompt_tokens=N, **settings)
    scores = noted(cache)
    read(llama, cache, ids[:, :N], 24, 24)
    with torch.no_grad(), kvtrim.attach(llama):
        for step in range(1, 25):
            llama(ids[:, N + step - 1 : N + step], past_key_values=cache)
            held = sum(int(heads.sum()) for heads in cache.entries())
            assert held <= (KEEP + every - 1) * 6
            if step % every == 0:
                assert held <= KEEP * 6
                alive = best_of_all(nested(scores), KEEP, recent=newest)
                assert models.positions(cache) == alive
                for layer in models.positions(cache):
                    for head in layer:
                        assert set(range(N + step - newest, N + step)) <= set(head)
                        assert set(range(SINKS)) <= set(head)


def test_saved_while_generating_it_goes_on_as_before(llama, tmp_path):
    ids = models.prompt(N + 12)
    cache = kvtrim.Cache(llama, "echo", KEEP, every=5, local=3, **TABLE)
    read(llama, cache, ids[:, : N + 3], N, 1, 1, 1)
    cache.save(tmp_path / "cache")
    again = kvtrim.load_cache(tmp_path / "cache", llama)
    for each in (cache, again):
        read(llama, each, ids[:, N + 3 :], *[1] * 9)
    assert models.positions(again) == models.positions(cache)
    assert sum(int(heads.sum()) for heads in cache.entries()) < 6 * (KEEP + 5)


def test_a_threshold_lets_what_is_held_follow_the_text(llama):
    ids = models.prompt(N)
    scores = foretold(llama, ids)
    below, above = sorted(x for layer in scores for head in layer for x in head)[60:62]
    least = (below + above) / 2  # a score itself may be rounded to either side
    for keep in (1.0, 30):
        cache = kvtrim.Cache(llama, "echo", keep, threshold=least, **TABLE)
        expected = best_of_all(scores, N if keep == 1.0 else keep, least=least)
        assert models.positions(read(llama, cache, ids)) == expected


def test_every_head_may_get_a_share_first(llama):
    ids = models.prompt(N)
    cache = read(llama, kvtrim.Cache(llama, "echo", KEEP, floor=0.5, **TABLE), ids)
    counts = [len(head) - SINKS for layer in models.positions(cache) for head in layer]
    assert min(counts) >= (KEEP - SINKS) // 2 and sum(counts) == 6 * (KEEP - SINKS)


def test_query_heads_with_entries_of_their_own_have_their_groups_scores(llama):
    ids = models.prompt(N)
    cache = kvtrim.Cache(llama, "echo", KEEP, granularity="query", budget="uniform", **TABLE)
    for layer in models.positions(read(llama, cache, ids)):
        assert layer[0] == layer[1] == layer[2] != layer[3] == layer[4] == layer[5]


def test_tables_are_of_exactly_one_model(llama, tmp_path):
    with pytest.raises(UsageError, match="calibrate echo"):
        kvtrim.Cache(llama, "echo", KEEP)
    path = tmp_path / "own.safetensors"
    echo_tables.write(path, EchoTable(torch.zeros(3, 2, 48), torch.zeros(3, 2)), {})
    kvtrim.Cache(llama, "echo", KEEP, table=str(path))
    for shape in ((2, 2, 48), (3, 6, 48), (3, 2, 47)):
        echo_tables.write(path, EchoTable(torch.zeros(shape), torch.zeros(shape[:2])), {})
        with pytest.raises(UsageError, match=f"{shape[0]} layers, {shape[1]} KV heads"):
            kvtrim.Cache(llama, "echo", KEEP, table=str(path))


def test_a_shipped_table_is_taken_for_exactly_its_weights(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(echo_tables, "SHIPPED", tmp_path)
    table = EchoTable(torch.zeros(3, 2, 48), torch.zeros(3, 2))
    record = {"identity": fingerprint.identity(llama)}
    echo_tables.write(tmp_path / "tiny.safetensors", table, record)
    assert kvtrim.Cache(llama, "echo", KEEP).method.policy.table == "tiny"
    with pytest.raises(UsageError, match="fitted on other weights"):
        kvtrim.Cache(models.tiny("llama", seed=5), "echo", KEEP)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_file_that_is_no_table_says_so(tmp_path, content):
    path = tmp_path / "table.safetensors"
    if content is None:
        weight = torch.full((3, 2, 48), torch.nan)
        echo_tables.write(path, EchoTable(weight, torch.zeros(3, 2)), {})
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="no echo table"):
        find("echo", table=str(path))
    with pytest.raises(UsageError, match="neither a file nor one that comes"):
        find("echo", table=str(tmp_path / "absent"))
