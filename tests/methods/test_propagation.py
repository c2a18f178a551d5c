"""What goes on to deeper layers: worked examples, oracles on models, compositions, refusals."""

import gc
import weakref

import pytest
import torch

import kvtrim
import models
from kvtrim.errors import BudgetError, UnsupportedModelError, UsageError
from kvtrim.hf.generate import read as read_in
from kvtrim.methods.policies.full import Full
from kvtrim.methods.propagation import Cascade, Restart, TokenSelective
from kvtrim.methods.settings import find
from kvtrim.types import LayerView, Target
from small import small

NARROWING = sorted(name for name in kvtrim.METHODS if find(name).propagation.narrows)


def view_of(queries, keys, keep=4):
    """A layer of one prompt whose queries [H, Q, D] and keys [K, S, D] are given."""
    return LayerView(
        index=1,
        layers=4,
        keep=keep,
        tokens=keys.shape[1],
        queries=queries[None],
        keys=keys[None],
        values=keys[None],
        positions=torch.arange(keys.shape[1]).int().expand(1, *keys.shape[:2]),
        scale=1.0,
    )


class Given(Full):
    """Scores as given, a window of two."""

    scores = torch.tensor([[[3, 1, 0, 2, 0, 0], [0, 0, 5, 0, 1, 0]]]).float()

    def recent(self, keep):
        return 2

    def score(self, layer):
        return self.scores


def test_the_worked_example_of_fastkv():
    view = view_of(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4))
    chosen = TokenSelective(tokens=5).choose(view, Given(), 8)
    assert chosen.tolist() == [[0, 2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        (0.2, 4096, 819),
        (0.2, 8192, 1638),
        (0.2, 32768, 6553),
        (0.2, 131072, 26214),
        (2048, 8192, 2048),
    ],
)
def test_how_many_tokens_go_on(tokens, n, expected):
    from kvtrim.methods.propagation.layers import amount

    assert amount(tokens, n) == expected


@pytest.mark.parametrize(
    ("logits", "keep", "expected"),
    [
        ([0, 5, 0, 0, 0, 0, 3, 3, 0, 0], 4, [5, 6, 7, 8]),
        ([-1] * 6, 2, [0, 5]),
        ([-1] * 6, 4, [0, 1, 4, 5]),
        ([1] * 6, 2, [2, 3]),
    ],
)
def test_the_worked_examples_of_gemfilter(logits, keep, expected):
    keys = torch.tensor(logits).float()[None, :, None]
    view = view_of(torch.ones(1, len(logits), 1), keys, keep)
    assert Restart().choose(view, Full(), len(logits)).tolist() == [expected]


def test_gemfilter_may_pad_with_edges_and_protect_the_ends():
    keys = -torch.ones(1, 6, 1)
    view = view_of(torch.ones(1, 6, 1), keys, 2)
    assert Restart(pad="edge").choose(view, Full(), 6).tolist() == [[0, 1]]
    assert Restart(pad="edge", sinks=1, recent=1).choose(view, Full(), 6).tolist() == [[0, 5]]


@pytest.mark.parametrize(
    ("layers", "recent", "decay", "n", "expected"),
    [
        (
            32,
            0.01,
            0.01,
            8192,
            {0: 8192, 1: 8192, 2: 8172, 3: 8095, 8: 5861, 16: 430, 24: 161, 31: 161},
        ),
        (32, 0.2, 0.7, 8192, {2: 8187, 3: 8168, 8: 7567, 16: 4473, 24: 2113, 31: 1706}),
        (36, 0.01, 0.01, 8192, {2: 8176, 3: 8115, 8: 6291, 16: 780, 24: 195, 35: 195}),
        (36, 0.2, 0.75, 8192, {2: 8188, 3: 8175, 8: 7772, 16: 5394, 24: 2747, 35: 1705}),
        (4, 0.2, 0.5, 1000, {0: 1000, 1: 1000, 2: 941, 3: 756}),
        (4, 0.2, 0.5, 100, {0: 100, 1: 100, 2: 94, 3: 94}),
    ],
)
def test_the_worked_examples_of_pyramidinfer(layers, recent, decay, n, expected):
    lengths = Cascade(recent=recent).lengths(n, layers, decay)
    assert {layer: lengths[layer] for layer in expected} == expected


@pytest.mark.parametrize(
    ("layers", "recent", "decay", "n", "mean"),
    [
        (32, 0.01, 0.01, 8192, 0.3400),
        (32, 0.2, 0.7, 8192, 0.5953),
        (36, 0.01, 0.01, 8192, 0.3275),
        (36, 0.2, 0.75, 8192, 0.6025),
        (32, 0.01, 0.01, 4000, 0.345),
        (32, 0.2, 0.3, 4000, 0.503),
        (32, 0.2, 0.7, 4000, 0.596),
        (36, 0.01, 0.01, 4000, 0.334),
        (36, 0.2, 0.75, 4000, 0.603),
        (40, 0.2, 0.78, 4000, 0.604),
        (32, 0.2, 0.9, 4000, 0.766),
    ],
)
def test_the_mean_lengths_of_pyramidinfer(layers, recent, decay, n, mean):
    lengths = Cascade(recent=recent).lengths(n, layers, decay)
    assert sum(lengths) / layers / n == pytest.approx(mean, abs=5e-4 + 5e-5)


@pytest.mark.parametrize("keep", [1600, 2000, 3000, 3999])
def test_a_cascade_finds_the_decay_that_its_budget_allows(keep):
    cascade, layers, n = Cascade(), 32, 4000
    decay = cascade.decay_for(n, layers, keep)
    assert sum(cascade.lengths(n, layers, decay)) <= keep * layers
    more = decay + 2e-3
    assert sum(cascade.lengths(n, layers, more)) > keep * layers or more > 1


def test_a_cascade_says_how_little_it_can_hold():
    least = Cascade().least(4000, 32)
    assert 0.3 * 4000 < least < 0.36 * 4000
    assert sum(Cascade().lengths(4000, 32, Cascade().decay_for(4000, 32, least))) <= least * 32
    fewest = min(sum(Cascade().lengths(500, 36, step / 200)) for step in range(201))
    assert Cascade().least(500, 36) == -(-fewest // 36), "lengths do not always shrink with decay"


def test_a_number_out_of_reach_is_refused_before_anything_is_read(llama):
    cache = kvtrim.Cache(llama, "pyramidinfer", 24)
    with torch.no_grad(), kvtrim.attach(llama):
        for _ in range(2):
            with pytest.raises(BudgetError, match="Use keep=48 or more"):
                llama(models.prompt(48), past_key_values=cache)
        share = kvtrim.Cache(llama, "pyramidinfer", 0.5)
        llama(models.prompt(48), past_key_values=share)
    assert cache.seen == 0 and share.seen == 48


def columns_read(model, ids, *given, **settings):
    """The columns that each layer read of one prompt."""
    cache, read = kvtrim.Cache(model, *given, **settings), {}
    cache.session._tap = lambda n, call: read.setdefault(n, cache.session.narrowing)
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, past_key_values=cache)
    return {n: None if part is None else part.columns[0].tolist() for n, part in read.items()}


@pytest.mark.parametrize("policy", ["knorm", "keydiff", "curdkv"])
def test_the_last_token_goes_on_whatever_scores(llama, policy):
    read = columns_read(llama, models.prompt(48), "fastkv", 24, policy=policy, tokens=20, layer=0)
    assert read[2][-1] == 47 and len(read[2]) == 20


@pytest.mark.parametrize(
    ("name", "keep", "settings"),
    [
        ("lava", 0.3, {"propagation": "token-selective"}),
        ("laprox", 40, {"propagation": "cascade", "decay": 0.0, "min_context": 0}),
        ("laprox", 24, {"propagation": "token-selective", "tokens": 12, "layer": 0}),
        ("cake", 24, {"propagation": "token-selective", "tokens": 12, "layer": 0}),
    ],
)
def test_layers_that_read_less_than_the_budget_compete_too(llama, name, keep, settings):
    cache = kvtrim.Cache(llama, name, keep, window=8, **settings)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(96), past_key_values=cache)
        llama(models.prompt(2), past_key_values=cache)
    entries = [int(counts.sum()) for counts in cache.entries()]
    assert cache.seen == 98 and sum(entries) < 98 * 2 * 3


@pytest.mark.parametrize("explicit", [True, False])
def test_a_restart_keeps_to_the_positions_it_was_given(llama, explicit):
    """Left padding without position ids, or ids that begin elsewhere: RoPE is relative."""
    ids, turn = models.prompt(48), models.prompt(5, seed=3)
    plain, other = (kvtrim.Cache(llama, "gemfilter", 24) for _ in "ab")
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=plain)
        expected = llama(turn, past_key_values=plain).logits
        if explicit:
            where = torch.arange(100, 153)[None]
            llama(ids, position_ids=where[:, :48], past_key_values=other)
            got = llama(turn, position_ids=where[:, 48:], past_key_values=other).logits
        else:
            padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1)
            mask = torch.ones(1, 62, dtype=torch.long)
            mask[:, :9] = 0
            llama(padded, attention_mask=mask[:, :57], past_key_values=other)
            got = llama(turn, attention_mask=mask, past_key_values=other).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_restart_counts_bytes_of_every_head_that_holds_entries(llama):
    cache = kvtrim.Cache(llama, "gemfilter", "64KiB", granularity="query")
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(400), past_key_values=cache)
    assert cache.held_bytes <= 2**16


@pytest.mark.parametrize("name", NARROWING)
def test_autocast(name):
    model = models.tiny(dtype=torch.float32)
    cache = kvtrim.Cache(model, name, 24, **small(name))
    context = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), kvtrim.attach(model), context:
        model(models.prompt(48), past_key_values=cache)
    assert cache.seen == 48


def test_a_cache_is_given_back_once_nobody_holds_it(llama):
    cache = kvtrim.Cache(llama, "fastkv", 24)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(48), past_key_values=cache)
        seen = weakref.ref(cache)
        del cache
        gc.collect()
        assert seen() is None


def test_select_refuses_what_does_not_fit_before_it_filters():
    q, k = torch.randn(3, 6, 48, 8), torch.randn(3, 2, 40, 8)
    with pytest.raises(UsageError, match="do not fit"):
        kvtrim.select("gemfilter", q, k, k, keep=24)


def test_progress_reaches_the_end_of_a_prompt_that_was_read_in_part(llama):
    told = []
    cache = kvtrim.Cache(llama, "gemfilter", 24)
    with kvtrim.attach(llama):
        read_in(llama, models.prompt(48), cache, progress=lambda *given: told.append(given))
    assert told[-1] == ("reading", 48, 48)


def test_a_decoder_called_with_positional_arguments(llama):
    ids, mask = models.prompt(48), torch.ones(1, 48, dtype=torch.long)
    caches = [kvtrim.Cache(llama, "gemfilter", 24) for _ in "ab"]
    with torch.no_grad(), kvtrim.attach(llama):
        one = llama.model(ids, mask, past_key_values=caches[0]).last_hidden_state
        other = llama.model(input_ids=ids, past_key_values=caches[1]).last_hidden_state
    assert torch.equal(one, other)


def test_the_votes_of_a_cascade_equal_a_loop():
    from oracles import window_weights

    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(h, 40, 8, generator=draw, dtype=torch.float64) for h in (6, 2))
    cascade = Cascade(recent=0.2, decay=0.5, min_context=4, weight=1.5, sinks=2)
    view = view_of(q, k)
    recent = 9
    weights = window_weights(q, k, recent, 1.0)[..., : 40 - recent]
    rows = torch.linspace(1, 1.5, recent)[None, :, None]
    scores = (weights * rows).mean(dim=(0, 1))
    scores[:2] = torch.inf
    count = int((40 - recent) * (0.5 * (2**-0.5 + 1) / 2 + 0.5))
    best = sorted(scores.argsort(descending=True, stable=True)[:count].tolist())
    assert cascade.choose(view, Full(), 40).tolist() == [[*best, *range(40 - recent, 40)]]


def test_gemfilter_reads_the_chosen_tokens_as_if_they_were_the_prompt(llama):
    ids, turn = models.prompt(48), models.prompt(5, seed=3)
    cache = kvtrim.Cache(llama, "gemfilter", 24, layer=1)
    with torch.no_grad(), kvtrim.attach(llama):
        first = llama(ids, past_key_values=cache, logits_to_keep=1).logits
        chosen = models.positions(cache)[0][0]
        more = llama(turn, past_key_values=cache).logits
    short = torch.cat([ids[:, chosen], turn], dim=1)
    with torch.no_grad():
        expected = llama(short).logits
    assert len(chosen) == 24
    assert cache.seen == 53
    torch.testing.assert_close(first, expected[:, 23:24], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(more, expected[:, 24:], rtol=1e-8, atol=1e-8)


def test_the_filter_layer_sees_what_the_untouched_model_computes(llama):
    """The recorded queries and keys of layer 1 choose the same tokens."""
    from kvtrim.hf.replay import record

    ids = models.prompt(48)
    call = record(llama, ids).calls[1]
    view = view_of(call.queries[0], call.keys[0], keep=20)
    cache = kvtrim.Cache(llama, "gemfilter", 20, layer=1)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=cache)
    assert models.positions(cache)[2][0] == Restart().choose(view, Full(), 48)[0].tolist()


def test_layers_above_the_filter_do_not_run_on_the_whole_prompt(llama):
    ids, read = models.prompt(48), []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, n=n: read.append((n, args[0].shape[1])))
        for n, block in enumerate(llama.model.layers)
    ]
    with torch.no_grad(), kvtrim.attach(llama):
        llama(ids, past_key_values=kvtrim.Cache(llama, "gemfilter", 24, layer=1))
        filtered, read[:] = [*read], []
        llama(ids, past_key_values=kvtrim.Cache(llama, "gemfilter", 48, layer=1))
    for hook in hooks:
        hook.remove()
    assert filtered == [(0, 48), (1, 48), (0, 24), (1, 24), (2, 24)]
    assert read == [(0, 48), (1, 48), (2, 48)], "a prompt that fits is read once"


@pytest.mark.parametrize("name", ["fastkv", "pyramidinfer"])
def test_narrowing_equals_the_later_layers_run_on_the_gathered_tokens(llama, name):
    """The slow way: decoder layers by hand, hidden states gathered between them."""
    ids = models.prompt(48)
    cache, parts = kvtrim.Cache(llama, name, 24, **small(name)), {}
    cache.session._tap = lambda n, call: parts.setdefault(n, cache.session.narrowing)
    with torch.no_grad(), kvtrim.attach(llama):
        logits = llama(ids, past_key_values=cache).logits
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        hidden, positions = llama.model.embed_tokens(ids), torch.arange(48)
        for number, block in enumerate(llama.model.layers):
            part = parts[number]
            if part is not None and part.layer == number - 1:
                keep = part.step[0]
                hidden, positions = hidden[:, keep], positions[keep]
            rope = llama.model.rotary_emb(hidden, positions[None])
            hidden = block(hidden, attention_mask=None, position_embeddings=rope)
        expected = llama.lm_head(llama.model.norm(hidden))
    assert logits.shape[1] < 48
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


def test_the_layer_that_chooses_spares_the_tokens_that_go_nowhere(llama):
    """Its MLP sees the chosen ones alone, and its attention asks for no others."""
    fed = []
    hooks = [
        block.mlp.gate_proj.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
        for block in llama.model.layers
    ]
    cache = kvtrim.Cache(llama, "fastkv", 24, tokens=30, layer=1)
    plain = kvtrim.Cache(llama, "snapkv", 24, window=8)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(48), past_key_values=cache)
        llama(models.prompt(48), past_key_values=plain)
        llama(models.prompt(3), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert fed == [48, 30, 30, 48, 48, 48, 3, 3, 3]


def test_the_reference_implementation_narrows_alike(llama):
    logits = []
    for impl in ("reference", "sdpa"):
        cache = kvtrim.Cache(llama, "fastkv", 24, tokens=30, impl=impl)
        with torch.no_grad(), kvtrim.attach(llama):
            logits.append(llama(models.prompt(48), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tokens", [48, 100, 1.0])
def test_fastkv_that_sends_everything_on_is_snapkv_with_its_settings(llama, tokens):
    ids = models.prompt(48)
    own = {"rows": "sum", "group": "sum", "group_order": "after", "window": 8}
    fast = kvtrim.Cache(llama, "fastkv", 24, tokens=tokens)
    snap = kvtrim.Cache(llama, "snapkv", 24, **own)
    with torch.no_grad(), kvtrim.attach(llama):
        logits = [llama(ids, past_key_values=cache).logits for cache in (fast, snap)]
    assert torch.equal(*logits)
    assert models.positions(fast) == models.positions(snap)


@pytest.mark.parametrize("policy", ["laprox", "knorm", "h2o", "adakv", "curdkv"])
@pytest.mark.parametrize("budget", ["uniform", "per-head", "pyramid"])
def test_fastkv_goes_with_any_policy_and_budget(llama, policy, budget):
    own = {"policy.window": 8} if policy in ("laprox", "h2o", "adakv") else {}
    method = find("fastkv", policy=policy, budget=budget, tokens=32, layer=0, **own)
    cache = kvtrim.Cache(llama, method, 24)
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(48), past_key_values=cache)
    reached = [{at for head in layer for at in head} for layer in models.positions(cache)]
    assert len(reached[1] | reached[2]) <= 32
    assert all(47 in layer for layer in reached) or policy in ("knorm", "curdkv")


def test_fastkv_goes_with_a_model_wide_budget(llama):
    cache = kvtrim.Cache(
        llama, find("laprox", propagation="token-selective", tokens=32, layer=0, window=8), 24
    )
    with torch.no_grad(), kvtrim.attach(llama):
        llama(models.prompt(48), past_key_values=cache)
    assert sum(int(counts.sum()) for counts in cache.entries()) == 24 * 2 * 3


def test_a_scorer_of_its_own_chooses_what_goes_on(llama):
    read = []
    for scorer in (None, "knorm"):
        cache = kvtrim.Cache(llama, "fastkv", 24, tokens=30, layer=0, scorer=scorer)
        parts = {}
        cache.session._tap = lambda n, call, p=parts, c=cache: p.setdefault(n, c.session.narrowing)
        with torch.no_grad(), kvtrim.attach(llama):
            llama(models.prompt(48), past_key_values=cache)
        read.append(parts[2].columns.tolist())
    assert read[0] != read[1]
    assert all(len(one[0]) == 30 for one in read)


@pytest.mark.parametrize("name", NARROWING)
def test_models_with_sliding_layers_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="slide"):
        kvtrim.Cache(models.tiny("gemma3_text"), name, 24)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("name", NARROWING)
def test_other_architectures_narrow_alike(architecture, name):
    """Tokens of a padded batch equal those of each prompt alone."""
    model = models.tiny(architecture)
    ids = models.prompt(48, rows=2)
    ids[1, :11], mask = 0, torch.ones(2, 48, dtype=torch.long)
    mask[1, :11] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with kvtrim.attach(model):
        both = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=kvtrim.Cache(model, name, 24, **small(name)),
            **options,
        )
        for row, start in enumerate((0, 11)):
            own = ids[row : row + 1, start:]
            alone = model.generate(
                input_ids=own,
                past_key_values=kvtrim.Cache(model, name, 24, **small(name)),
                **options,
            )
            assert torch.equal(both[row, 48:], alone[0, 48 - start :])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fastkv", {"tokens": 0}, "tokens=0: expected int .1 or more"),
        ("fastkv", {"tokens": 1.5}, "tokens=1.5: expected int"),
        ("fastkv", {"scorer": "h2o"}, "at sight"),
        ("fastkv", {"reuse": 2}, "reuse"),
        ("kvzip", {"propagation": "token-selective"}, "probes"),
        ("gemfilter", {"positions": "rolled"}, "restart"),
        ("gemfilter", {"kernel": 4}, "odd"),
        ("gemfilter", {"sinks": -1}, "sinks=-1: expected int .0 or more"),
        ("pyramidinfer", {"decay": 1.5}, "decay=1.5: expected float .0 to 1"),
        ("pyramidinfer", {"interval": 0}, "interval=0: expected int .1 or more"),
    ],
)
def test_settings_without_meaning_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        find(name, **settings)


@pytest.mark.parametrize(("name", "layer"), [("fastkv", 2), ("fastkv", -1), ("gemfilter", 3)])
def test_a_layer_that_the_model_does_not_have_is_refused(llama, name, layer):
    with pytest.raises(UsageError, match=f"layer={layer}"):
        kvtrim.Cache(llama, name, 24, layer=layer)


@pytest.mark.parametrize(
    ("model", "layers", "tsp", "gem"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 32, 15, 13),
        ("mistralai/Mistral-Nemo-Instruct-2407", 40, 19, 19),
        ("mistralai/Ministral-8B-Instruct-2410", 36, 17, 17),
        ("somebody/else", 28, None, None),
    ],
)
def test_published_layers_are_known_by_the_models_name(model, layers, tsp, gem):
    target = Target(model, layers, 32, lambda: None)
    assert TokenSelective().fitted(target).layer == tsp
    assert Restart().fitted(target).layer == gem
