"""Tokens of many caches in one row of one pass go on as each would alone."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvtrim
import models
from kvtrim.engine import row
from kvtrim.engine.branch import Base, Branch, Stem, Tail
from kvtrim.engine.graph import Capture
from kvtrim.errors import CacheError
from kvtrim.hf import pack as module
from kvtrim.hf.pack import Feed, Pack, base_of, position
from small import small

METHODS = {
    "snapkv": {},
    "adakv": {},
    "kvzip": {},
    "gemfilter": {},
    "fastkv": {},
    "laprox": {"refit": "values+bias"},
    "pyramidkv": {"granularity": "query"},
    "full": {},
    "h2o": {},
    "tova": {},
    "streaming-llm": {"positions": "rolled"},
    "shotkv": {},
}
SHARED = [*METHODS][:8]
NARROW = ["gemfilter", "fastkv"]  # refuse models some layers of which slide
SLIDE = ["gemma2", "gemma3_text"]


def read(model, name, number, impl="auto"):
    settings = small(name) | METHODS[name]
    cache = kvtrim.Cache(model, name, 24, impl=impl, **settings)
    with torch.no_grad(), kvtrim.attach(model):
        model(models.prompt(48 + 5 * number, number), past_key_values=cache)
    return cache


def alone(model, cache, ids):
    """Logits after each token, one pass each through the cache's own attention."""
    found = []
    with torch.no_grad(), kvtrim.attach(model):
        for token in ids:
            at = torch.tensor([[cache.seen]])
            out = model(torch.tensor([[token]]), position_ids=at, past_key_values=cache)
            found.append(out.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", *SLIDE])
def test_feeds_of_all_kinds_go_on_as_each_alone(architecture):
    model = models.tiny(architecture)
    draw = torch.Generator().manual_seed(1)
    names = [name for name in METHODS if architecture not in SLIDE or name not in NARROW]
    length = 18 if architecture in SLIDE else 9  # beyond the windows of layers that slide
    caches = {name: read(model, name, n) for n, name in enumerate(names)}
    lines, expected, into = [], [], []
    for name, cache in caches.items():
        for _ in range(2 if name in SHARED else 1):  # two continuations of one prompt
            ids = torch.randint(4, 260, (length,), generator=draw).tolist()
            lines.append(ids)
            expected.append(alone(model, cache.copy(), ids))
        if name in SHARED:
            base = base_of(cache.copy())
            into += [Branch(base), Branch(base)]
        else:
            into.append(cache)
    plain = torch.randint(4, 260, (length,), generator=draw).tolist()
    lines.append(plain)
    expected.append(alone(model, kvtrim.Cache(model, "full", 1.0), plain))
    into.append(Branch())
    pack, done = Pack(model), [0] * len(lines)
    with kvtrim.attach(model):
        for step in range(3 * length):
            feeds, who = [], []
            for number, ids in enumerate(lines):
                left = len(ids) - done[number]
                single = isinstance(into[number], kvtrim.Cache)  # evicts as tokens come
                count = 1 if single else min(left, 1 + (step + number) % 3)
                if left and (step + number) % 4 < 3:  # some sit a pass out
                    feeds.append(Feed(into[number], ids[done[number] :][:count]))
                    who.append((number, count))
            if not feeds:
                continue
            logits = pack.feed(model, feeds)
            for (number, count), row in zip(who, logits, strict=True):
                done[number] += count
                torch.testing.assert_close(
                    row, expected[number][done[number] - 1], atol=1e-9, rtol=1e-7
                )
    assert done == [length] * len(lines)


def starts(model, base, count, room=0):
    """Branches with 1, 2, ... tokens read apart, and the tokens that they go on with."""
    draw, pack = torch.Generator().manual_seed(2), Pack(model)
    branches = [Branch(base, room=room) for _ in range(count)]
    for number, branch in enumerate(branches):
        pack.feed(model, [Feed(branch, torch.randint(4, 260, (1 + number,)).tolist())])
    return branches, torch.randint(4, 260, (30, count), generator=draw).tolist()


def stacks(branches, layer=0):
    """How many stacks hold these, and how many of them are in one."""
    places = [each.tails[layer].place for each in branches if each.tails]
    held = [id(place[0]) for place in places if place is not None]
    return len(set(held)), len(held)


@pytest.mark.parametrize(
    ("architecture", "kernel"), [("llama", True), ("llama", False), *((a, True) for a in SLIDE)]
)
def test_answers_that_come_and_go_share_products_and_are_those_of_each_alone(
    monkeypatch, architecture, kernel
):
    model = models.tiny(architecture)
    bases = [base_of(read(model, name, n)) for n, name in enumerate(["adakv", "snapkv"])]
    monkeypatch.setattr(row, "_SHORT", 24)
    monkeypatch.setattr(row, "_STEP", 4)
    if not kernel:
        monkeypatch.setattr("kvtrim.kernels.parts.attend_by_torch", lambda *given: None)
    pack, most, longest = Pack(model), 0, 0
    with kvtrim.attach(model):
        branches, lines = starts(model, bases[0], 6)
        branches[1].base = branches[4].base = bases[1]  # what was read stays as it is
        apart = [each.copy(len(each.ids)) for each in branches]
        for step, tokens in enumerate(lines):
            here = [n for n in range(6) if (n + step // 3) % 5]  # for three passes each
            feeds = [Feed(branches[n], [tokens[n]] * (1 + (n == step % 7))) for n in here]
            logits = pack.feed(model, feeds)
            for feed, n, got in zip(feeds, here, logits, strict=True):
                (alone,) = pack.feed(model, [Feed(apart[n], feed.ids)])
                torch.testing.assert_close(got, alone, atol=1e-9, rtol=1e-7)
            most = max(most, stacks([branches[n] for n in here])[1])
            longest = max(longest, len(branches[here[-1]].ids))
    assert most == 5 and longest > row._SHORT
    assert stacks(apart) == (0, 0)


def test_a_stack_lasts_and_takes_no_more_room_than_was_promised(monkeypatch):
    model = models.tiny("llama")
    base, pack = Base(read(model, "snapkv", 0).session), Pack(model)
    with kvtrim.attach(model):
        branches, lines = starts(model, base, 4, room=40)
        pack.feed(model, [Feed(branches[3], [9] * 300)])
        branches[3].room = 320
        kept = set()
        for tokens in lines:
            pack.feed(model, [Feed(b, [t]) for b, t in zip(branches, tokens, strict=True)])
            kept.add(id(branches[0].tails[0].place[0]))
        assert len(kept) == 1
        assert stacks(branches) == (1, 3)  # the long one would make all of them long
        held = branches[0].tails[0].keys
        assert held.shape[2] == 40  # there will be no more
        assert held.untyped_storage().nbytes() == 3 * held.nbytes
        ended = branches[2].copy(len(branches[2].ids))
        pack.feed(model, [Feed(each, [7]) for each in branches[:2]])
        left = branches[0].tails[0].keys
        assert left.untyped_storage().nbytes() == 2 * left.nbytes
        assert ended.tails[0].place is None


@pytest.mark.parametrize("name", [None, "snapkv", "adakv"])
@pytest.mark.parametrize("architecture", ["llama", *SLIDE])
def test_continuations_of_a_continuation_share_what_it_read(architecture, name):
    model = models.tiny(architecture)
    base = None if name is None else base_of(read(model, name, 0))
    draw, pack = torch.Generator().manual_seed(3), Pack(model)
    lines = torch.randint(4, 260, (12, 6), generator=draw).tolist()
    with kvtrim.attach(model):
        first, other = Branch(base, room=40), Branch(base)
        pack.feed(model, [Feed(first, lines[0] * 4), Feed(other, lines[1])])
        stem = Stem(first)
        second = Branch(stem)
        pack.feed(model, [Feed(second, lines[2])])
        into = [Branch(Stem(second)), first, Branch(stem), other, Branch(stem)]
        assert into[2].base._layers[0][0][0].data_ptr() == first.tails[0].keys.data_ptr()
        known = [*lines[0] * 4, *lines[2]], lines[0] * 4, lines[0] * 4, lines[1], lines[0] * 4
        apart = [Branch(base) for _ in known]
        for branch, ids in zip(apart, known, strict=True):
            pack.feed(model, [Feed(branch, list(ids))])
        assert [position(each) for each in into] == [position(each) for each in apart]
        for tokens in lines[3:]:
            feeds = [Feed(each, [token]) for each, token in zip(into, tokens, strict=False)]
            logits = pack.feed(model, feeds)
            for feed, branch, got in zip(feeds, apart, logits, strict=True):
                (alone,) = pack.feed(model, [Feed(branch, feed.ids)])
                torch.testing.assert_close(got, alone, atol=1e-9, rtol=1e-7)


def seated(model, count, room=40):
    """A pack that gives seats, continuations of two prompts, and copies of these to go alone."""
    bases = [base_of(read(model, name, n)) for n, name in enumerate(["adakv", "laprox"])]
    branches, lines = starts(model, bases[0], count, room)
    for number, branch in enumerate(branches):
        branch.base = bases[number % 2]  # what was read stays as it is
    return (
        Pack(model, seats=True),
        branches,
        [each.copy(len(each.ids)) for each in branches],
        lines,
    )


def fed(model, pack, branches, tokens):
    return pack.feed(model, [Feed(each, [t]) for each, t in zip(branches, tokens, strict=False)])


def sitting(model, count):
    """The same, after three passes; the lines begin with what comes next."""
    pack, branches, apart, lines = seated(model, count)
    for tokens in lines[:3]:
        fed(model, pack, branches, tokens)
    return pack, branches, apart, lines[3:]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_answers_in_seats_are_those_of_each_alone_whoever_comes_and_goes(architecture):
    model = models.tiny(architecture)
    plain, sat = Pack(model), 0
    with kvtrim.attach(model):
        pack, branches, apart, lines = seated(model, 6)
        for step, tokens in enumerate(lines[:28]):
            here = [n for n in range(6) if step < 28 - 4 * n or step > 24]  # one after the other
            if step == 20:
                here.append(5)  # joins, by a question of more tokens
            feeds = [Feed(branches[n], [tokens[n]] * (1 + (n == 5))) for n in here]
            logits = pack.feed(model, feeds)
            sat += pack._seats is not None
            for feed, n, got in zip(feeds, here, logits, strict=True):
                (alone,) = plain.feed(model, [Feed(apart[n], feed.ids)])
                torch.testing.assert_close(got, alone, atol=1e-9, rtol=1e-7)
                assert branches[n].ids == apart[n].ids
    assert 10 < sat < 27  # not where they are new, and not with a question


def test_seats_last_while_some_leave_and_what_is_empty_is_given_back():
    model = models.tiny("llama")
    with kvtrim.attach(model):
        pack, branches, _, lines = sitting(model, 6)
        seats, held = pack._seats, branches[0].tails[0].keys.untyped_storage().nbytes()
        assert seats is not None and seats.plain == "interpreted on a CPU"
        assert held == 6 * branches[0].tails[0].keys.nbytes == 6 * 2 * 40 * 8 * 8
        left = branches.pop(1)
        before = [tail.keys.clone() for tail in left.tails]
        assert pack.empty_bytes == 0
        pack.leave(left)
        assert pack.empty_bytes == left.nbytes > 0
        for tokens in lines[:3]:
            fed(model, pack, branches, tokens)
        assert pack._seats is seats
        assert all(map(torch.equal, (tail.keys for tail in left.tails), before))
        fed(model, pack, branches[:3], lines[3])  # the others left, and nobody said so
        assert pack._seats is seats
        pack.leave(branches[0])
        assert pack._seats is None and pack.empty_bytes == 0  # more are empty than not


def test_what_seats_held_is_freed_when_they_are_given_up_whoever_goes_on():
    model = models.tiny("llama")
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        with kvtrim.attach(model):
            pack, branches, apart, lines = sitting(model, 6)
            stack = weakref.ref(branches[0].tails[0].place[0])
            seats, gone = weakref.ref(pack._seats), weakref.ref(branches[5])
            pack.leave(branches.pop())
            pack.leave_seats()
            assert seats() is stack() is gone() is None
            assert all(
                each.keys.untyped_storage().nbytes() == each.keys.nbytes
                for branch in branches
                for each in branch.tails
            )
            base, pack = weakref.ref(branches[0].base), Pack(model)
            fed(model, pack, branches, lines[0])
            fed(model, pack, branches[:1], lines[1])  # one that was stacked goes on alone
            tail = branches[0].tails[0]
            assert tail.keys.untyped_storage().nbytes() == tail.keys.nbytes
            branches.clear()
            apart.clear()
            del tail
            assert base() is None  # a pass that is over keeps nothing
    finally:
        gc.enable()


def test_seats_for_which_memory_is_short_are_done_without(monkeypatch):
    model, tried = models.tiny("llama"), []

    class Short(Capture):
        def __init__(self, *given):
            tried.append(1)
            raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr("kvtrim.hf.seats.Capture", Short)
    with kvtrim.attach(model):
        pack, branches, apart, lines = seated(model, 3)
        for tokens in lines[:20]:
            logits = fed(model, pack, branches, tokens)
            plain = fed(model, Pack(model), apart, tokens)
            torch.testing.assert_close(logits, plain, atol=1e-9, rtol=1e-7)
    assert len(tried) == 1 and not pack.has_seats


def test_forks_keep_the_seats_when_the_first_of_them_ends():
    model = models.tiny("llama")
    with kvtrim.attach(model):
        pack, branches, _, lines = seated(model, 2)
        fed(model, pack, branches, lines[0])
        stem = Stem(branches[0])
        forks = [Branch(stem, room=40) for _ in range(4)]
        for tokens in lines[1:5]:
            fed(model, pack, [branches[0], *forks], tokens)
        seats = pack._seats
        assert seats is not None
        pack.leave(branches[0])
        assert pack._seats is seats


def test_a_continuation_that_is_cut_back_leaves_what_others_go_on_from():
    model = models.tiny("llama")
    with kvtrim.attach(model):
        first, plain = Branch(room=40), Branch(room=40)
        for branch in (first, plain):
            Pack(model).feed(model, [Feed(branch, [5, 6, 7, 8, 9])])
        other = Branch(Stem(first))
        first.crop(2)
        Pack(model).feed(model, [Feed(first, [40, 41, 42])])
        (got,) = Pack(model).feed(model, [Feed(other, [11])])
        (want,) = Pack(model).feed(model, [Feed(plain, [11])])
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


def test_seats_do_not_keep_a_prompt_that_nobody_continues():
    model = models.tiny("llama")
    with kvtrim.attach(model):
        pack, branches, *_ = sitting(model, 3)
        assert pack._seats is not None
        pack.leave(branches[1])  # the only one of its prompt
        assert pack._seats is None


def test_seats_are_left_for_what_moved_entries_or_takes_more_than_was_promised():
    model = models.tiny("llama")
    with kvtrim.attach(model):
        pack, branches, apart, lines = seated(model, 4)
        for tokens in lines[:4]:
            fed(model, pack, branches, tokens)
        seats, plain = pack._seats, Pack(model)
        fed(model, plain, branches[:2], lines[4])  # another stack
        fed(model, pack, branches, lines[5])
        assert pack._seats is not seats is not None
        for branch in branches[:2]:
            branch.crop(len(branch.ids) - 1)
        for tokens in lines[6:30]:  # whatever happens to the seats
            fed(model, pack, branches, tokens)
        expected = lines[:6], lines[:4] + lines[5:6]
        for number, branch in enumerate(branches):
            own = [tokens[number] for tokens in expected[number > 1]][: 5 if number < 2 else None]
            own += [tokens[number] for tokens in lines[6:30]]
            for token in own:
                (alone,) = plain.feed(model, [Feed(apart[number], [token])])
            assert branch.ids == apart[number].ids
        assert min(len(each.ids) for each in branches) < 40  # as much as was promised ...
        for branch in branches:
            branch.room = len(branch.ids)
        logits = fed(model, pack, branches, lines[0])  # ... and more
        assert pack._seats is None
        for copied, token, got in zip(apart, lines[0], logits, strict=True):
            (alone,) = plain.feed(model, [Feed(copied, [token])])
            torch.testing.assert_close(got, alone, atol=1e-9, rtol=1e-7)


class Watch(TorchDispatchMode):
    """Notes what a graph could not capture: numbers that come from the host, or go to it."""

    def __init__(self):
        super().__init__()
        self.calls, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        asks = ("local_scalar", "lift_fresh", "nonzero", "equal", "unique")
        self.calls += 1
        if {x.device.type for x in tensors} - {"meta"} or any(name in str(func) for name in asks):
            self.found.append(str(func))
        return out


def on_meta(model, lengths, bias):
    """A prompt as if it lay on a device: of every head so many entries."""
    held = torch.zeros(1, 1, max(lengths), 8, dtype=torch.float64, device="meta")
    base = Base.__new__(Base)
    base.tokens = base.position = 60
    weights = torch.zeros(1, 1, max(lengths), device="meta") if bias else None
    runs = [
        (held[:, :, :n], held[:, :, :n], None if weights is None else weights[:, :, :n])
        for n in lengths
    ]
    base._layers = [runs] * model.config.num_hidden_layers
    return base


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_step_of_seats_asks_nothing_of_the_host_so_that_it_can_be_captured(
    monkeypatch, architecture
):
    model, watch = models.tiny(architecture).to("meta"), Watch()

    class Watched(Capture):
        def __call__(self):
            with watch:
                return super().__call__()

    monkeypatch.setattr("kvtrim.hf.seats.Capture", Watched)
    monkeypatch.setattr("kvtrim.kernels.parts.attend_by_torch", lambda *given: None)  # of CPUs
    bases = (
        on_meta(model, (20, 13), True),
        on_meta(model, (5, 9), False),
        on_meta(model, (7,), True),
    )
    branches = []
    for n in range(7):
        branches.append(Branch(bases[n % 3], [1] * (n + 1), room=(40, 400)[n % 2]))
        held = torch.zeros(1, 2, n + 1, 8, dtype=torch.float64, device="meta")
        branches[-1].tails = [Tail(held, held) for _ in range(model.config.num_hidden_layers)]
    branches.append(Branch(None, [1], room=40))
    branches[-1].tails = branches[0].tails
    pack = Pack(model, seats=True)
    with kvtrim.attach(model):
        pack._before = {id(branch) for branch in branches}
        for _ in range(3):
            fed(model, pack, branches, [3] * 8)
        row = pack._seats.row
    columns = [own for level in row._bases for _, own in level]
    assert any(isinstance(own, torch.Tensor) for own in columns) and len(row._groups) == 2
    assert watch.calls > 1000 and not watch.found


@pytest.mark.parametrize("architecture", SLIDE)
def test_layers_that_slide_get_no_seats(architecture):
    assert not Pack(models.tiny(architecture), seats=True).gives_seats


@pytest.mark.parametrize("single", [True, False])
def test_rows_that_fill_a_product_up_are_nobodys(monkeypatch, single):
    model = models.tiny("llama")
    base, pack = Base(read(model, "adakv", 0).session), Pack(model)
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(given[0].shape[1])
    )
    caches = [] if single else [read(model, "h2o", 0)]
    with kvtrim.attach(model):
        branches, _ = starts(model, base, 10)
        apart = [each.copy(len(each.ids)) for each in branches] + [each.copy() for each in caches]
        feeds = [Feed(into, [5]) for into in [*caches, *branches]]
        seen.clear()
        got = pack.feed(model, feeds)
        assert got.shape[0] == len(feeds) and seen == [16]
        monkeypatch.setattr(module, "_FEW", 16)
        plain = pack.feed(model, [Feed(into, [5]) for into in [*apart[10:], *apart[:10]]])
        assert seen == [16, len(feeds)]
        again = pack.feed(model, [Feed(into, [6]) for into in [*caches, *branches]])
        torch.testing.assert_close(got, plain, atol=1e-9, rtol=1e-7)
        plain = pack.feed(model, [Feed(into, [6]) for into in [*apart[10:], *apart[:10]]])
        torch.testing.assert_close(again, plain, atol=1e-9, rtol=1e-7)
    hook.remove()


def test_continuations_are_cut_back_copied_and_leave_the_prompt_alone():
    model = models.tiny("llama")
    base = Base(read(model, "adakv", 0).session)
    pack, one = Pack(model), Branch(base)
    with kvtrim.attach(model):
        first = pack.feed(model, [Feed(one, [5, 6, 7, 8])])
        two = one.copy(2)
        assert two.nbytes < one.nbytes and two.ids == [5, 6] and position(two) == base.tokens + 2
        pack.feed(model, [Feed(one, [9]), Feed(two, [20, 21])])
        one.crop(2)
        again = pack.feed(model, [Feed(one, [7, 8])])
    torch.testing.assert_close(first, again)
    assert one.ids == [5, 6, 7, 8] and two.ids == [5, 6, 20, 21]


def test_a_pass_that_fails_leaves_continuations_as_they_were(monkeypatch):
    model = models.tiny("llama")
    branch, pack = Branch(Base(read(model, "snapkv", 0).session)), Pack(model)
    with kvtrim.attach(model):
        wanted = pack.feed(model, [Feed(branch.copy(0), [5, 6, 7])])
        pack.feed(model, [Feed(branch, [5])])

        def fail(*given):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="memory"):
            patched.setattr(model.get_decoder().layers[1].mlp, "forward", fail)
            pack.feed(model, [Feed(branch, [99, 98])])
        assert branch.ids == [5]
        torch.testing.assert_close(pack.feed(model, [Feed(branch, [6, 7])]), wanted)


@pytest.mark.parametrize("name", ["h2o", "streaming-llm"])
def test_what_goes_on_evicting_cannot_be_shared(name):
    with pytest.raises(CacheError, match="nothing is evicted"):
        Base(read(models.tiny("llama"), name, 0).session)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
def test_parts_joined_are_attention_over_everything(dtype, softcap, biased):
    from kvtrim.kernels import sdpa
    from kvtrim.kernels.parts import attend_part, join_parts

    torch.manual_seed(0)
    queries = torch.randn(1, 6, 300, 8, dtype=dtype)
    keys, values = torch.randn(2, 1, 2, 340, 8, dtype=dtype).unbind(0)
    bias = torch.randn(1, 2, 340, dtype=dtype) if biased else None
    whole = sdpa.dense(queries, keys, values, 0.3, softcap, bias)
    first = None if bias is None else bias[:, :, :40]
    rest = None if bias is None else bias[:, :, 40:]
    parts = [
        attend_part(queries, keys[:, :, :40], values[:, :, :40], 0.3, softcap, first),
        attend_part(queries, keys[:, :, 40:], values[:, :, 40:], 0.3, softcap, rest, causal=True),
    ]
    torch.testing.assert_close(join_parts(parts), whole)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 20, 300])
def test_a_window_is_attention_over_the_last_slots_alone(softcap, biased, count):
    from kvtrim.kernels.parts import attend_last, attend_part

    torch.manual_seed(0)
    queries = torch.randn(1, 6, count, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 2, 320, 8, dtype=torch.float64).unbind(0)
    bias = torch.randn(1, 2, 320, dtype=torch.float64) if biased else None
    for window in (1, 16, 310, 400):
        out, lse = attend_part(queries, keys, values, 0.3, softcap, bias, True, window)
        ends = torch.arange(320 - count, 320) + 1
        for number in range(0, count, max(1, count // 5)):
            seen = slice(max(0, int(ends[number]) - window), int(ends[number]))
            own = slice(number, number + 1)
            part = None if bias is None else bias[:, :, seen]
            given = queries[:, :, own], keys[:, :, seen], values[:, :, seen], 0.3, softcap, part
            wanted = attend_part(*given)
            torch.testing.assert_close((out[:, :, own], lse[:, :, own]), wanted)
    counts = torch.arange(count) % 320 + 1
    out, lse = attend_last(queries, keys, values, 0.3, softcap, counts)
    for number in range(0, count, max(1, count // 5)):
        own, last = slice(number, number + 1), slice(-int(counts[number]), None)
        given = queries[:, :, own], keys[:, :, last], values[:, :, last], 0.3, softcap
        torch.testing.assert_close((out[:, :, own], lse[:, :, own]), attend_part(*given))
