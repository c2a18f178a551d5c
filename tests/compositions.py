"""Random compositions: any method, preset, budget, schedule, unit and batch, however it is used.

    python experiments/compose.py --cases 3000 --seed 1

A case is drawn from a seed and a number: a method with its parts changed, a budget, prompts beside
each other with padding, read at once or in passes, and then steps, turns, cropping, other rows,
copies, marks and saved files. Two things must hold whatever was drawn:

- Every prompt of the batch keeps, after each of these, what it keeps alone, and has its logits.
- Alone, its logits are those of the untouched model whose attention is masked to what the cache
  said it held (`oracles.run_masked`, which shares no code with kvtrim).

A method may refuse a case with an error of kvtrim's own; any other error is a fault. Scores are
made in float64 here, so that sums rounded in another order decide nothing.
"""

import random
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as remembered
from itertools import pairwise
from pathlib import Path

import torch

import kvtrim
import models
import oracles
from kvtrim.errors import KvtrimError
from kvtrim.methods.budgets import BUDGETS
from kvtrim.methods.settings import find, parameters
from small import table

PLAIN, SLIDING = ("llama", "qwen3"), ("gemma2", "gemma3_text")
TOLERANCE = 1e-5  # parts of some models are float32 whatever their weights are


@dataclass(frozen=True)
class Case:
    """What one composition consists of; enough to repeat it."""

    architecture: str
    method: str
    settings: dict
    keep: int | float | str
    spans: list | None  # named parts, for each prompt
    passes: list  # of the prompt: (ids, mask)
    ops: list  # what follows: (what it is, its arguments)


@dataclass
class Played:
    """What came of a case, step by step."""

    held: list = field(default_factory=list)  # positions per prompt, layer and head
    logits: list = field(default_factory=list)  # of every prompt's tokens; None where none came
    refused: set = field(default_factory=set)  # numbers of steps that the cache refused
    tokens: list = field(default_factory=list)  # of a prompt alone, and for each of them:
    sights: list = field(default_factory=list)  # what it saw, by layer and head
    expected: list = field(default_factory=list)  # its logits
    read: dict = field(default_factory=dict)  # of the prompt by each layer, where not all was


# Drawing


def draw(seed, number):
    """A case that the library takes, and how many it refused before."""
    rng = random.Random(f"{seed}-{number}")
    refused = 0
    while True:
        case = _drawn(rng)
        try:
            _cache(model(case.architecture), case, slice(None), len(case.passes[0][0]))
            return case, refused
        except KvtrimError:
            refused += 1


def _drawn(rng):
    sliding = rng.random() < 0.25
    architecture = rng.choice(SLIDING if sliding else PLAIN)
    method, settings = _method(rng, 2 if sliding else 3)
    lengths = [
        rng.randint(1, 3) if rng.random() < 0.12 else rng.randint(4, 44)
        for _ in range(rng.choice((1, 2, 3, 3)))
    ]
    if rng.random() < 0.25:
        lengths = lengths[:1] * len(lengths)
    chunked = settings.get("chunks") or rng.random() < 0.2
    side = "left" if chunked or sliding or rng.random() < 0.8 else "right"
    prompt = _padded(rng, lengths, side)
    passes = _split(rng, prompt) if chunked else [prompt]
    spans = None
    if rng.random() < 0.3 and min(lengths) > 8:
        spans = [_spans(rng, length) for length in lengths]
    if settings.get("demote"):
        spans = spans or [{} for _ in lengths]
        spans = [own | _structure(rng, n) for own, n in zip(spans, lengths, strict=True)]
    keep = rng.choice((rng.randint(2, 40), round(rng.uniform(0.05, 0.95), 2), rng.randint(4, 24)))
    shared = settings.get("granularity") == "query" and len(lengths) > 1
    if rng.random() < 0.1 and not shared:  # bytes depend on whether neighbours are expanded
        keep = f"{rng.randint(2, 20) * len(lengths)}KiB"
    return Case(architecture, method, settings, keep, spans, passes, _ops(rng, lengths, sliding))


def _method(rng, layers):
    name = rng.choice(sorted(kvtrim.METHODS))
    method, settings = kvtrim.METHODS[name], {}
    if method.presets and rng.random() < 0.4:
        settings["preset"] = rng.choice(sorted(method.presets))
    changes = {
        "budget": (0.35, [*sorted(BUDGETS), "per-head", "per-head", "per-head"]),
        "every": (0.5, (None, 1, 1, 1, 2, 3, 4, 7)),
        "ahead": (0.08, (True,)),
        "chunks": (0.12, (True,)),
        "region": (0.16, ("generated", "generated", "blocks")),
        "unit": (0.2, ("token", "chunk", "shot")),
        "policy": (0.1, ("snapkv", "knorm", "keydiff", "h2o", "tova", "circuitkv", "criticalkv")),
        "granularity": (0.12, ("query",)),
        "positions": (0.06, ("rolled",)),
        "skip_layers": (0.06, ((0,), (1,))),
        "reuse": (0.06, (2,)),
        "propagation": (0.05, ("token-selective", "everything")),
        "refit": (0.1, ("none", "values", "values+bias")),
        "demote": (0.1, (True,)),
    }
    settings |= {k: rng.choice(v) for k, (chance, v) in changes.items() if rng.random() < chance}
    try:
        known = parameters(find(name, **settings))
    except KvtrimError:
        return name, settings
    finer = {
        "window": (0.95, (2, 3, 4, 8)),
        "kernel": (0.3, (1, 3, 5)),
        "pool": (0.2, ("avg", "max", "none")),
        "chunk": (0.7, (3, 4, 5)),
        "fill": (0.4, ("none", "partial", "stop", "skip")),
        "window_competes": (0.2, (True,)),
        "shared": (0.2, (True,)),
        "run": (0.7, (2, 3, 5)),
        "floor": (0.4, (0.0, 0.3, 1.0)),
        "rule": (0.3, ("blend", "floor")),
        "normalize": (0.3, (True,)),
        "exact": (0.2, (True,)),
        "floor_of": (0.15, ("layer", "keep")),
        "share": (0.4, (0.3, 0.6)),
        "newest": (0.2, (1, 2, 0.1)),
        "deepest": (0.3, (0.2, 0.6)),
        "tokens": (0.5, (6, 0.3, 0.6)),
        "decay": (0.8, (0.2, 0.6)),
        "min_context": (0.8, (3, 6)),
        "heavy": (0.05, (3, 6)),
        "surface": (0.3, ("max", "split", "own")),
        "rows": (0.2, ("mean", "sum")),
        "accumulate": (0.2, (True, False)),
        "min_shots": (0.15, (1,)),
    }
    for short, (chance, values) in finer.items():
        full = [each for each in known if each.rpartition(".")[2] == short]
        if (
            full
            and rng.random() < chance
            and (_trims(known) or short not in ("share", "newest", "deepest"))
        ):
            settings[rng.choice(full)] = rng.choice(values)
    if "budget.table" in known:
        settings |= table("headkv", layers=layers)
    return name, settings


def _trims(known):
    return known["schedule.region"] != "all"


def _ids(rng, rows, columns, known=range(4, 200)):
    """No token comes to a prompt twice: rounding alone would rank what is the same."""
    return torch.tensor([rng.sample(known, columns) for _ in range(rows)])


def _padded(rng, lengths, side):
    width, columns = max(lengths), torch.arange(max(lengths))
    own = torch.tensor(lengths)[:, None]
    mask = columns < own if side == "right" else columns >= width - own
    return _ids(rng, len(lengths), width), mask


def _split(rng, prompt):
    width = prompt[0].shape[1]
    cuts = sorted({0, width, *(rng.randint(0, width) for _ in range(rng.randint(1, 3)))})
    return [tuple(part[:, a:b] for part in prompt) for a, b in pairwise(cuts)]


def _spans(rng, length):
    start, end = rng.randint(0, 2), length - rng.randint(0, 3)
    cuts = sorted({start, end, *(rng.randint(start, end) for _ in range(4))})
    shots = list(pairwise(cuts))
    return {"shots": shots, "question": [(end, length)] if end < length else []}


def _structure(rng, length):
    tokens = sorted(rng.sample(range(length), rng.randint(0, length // 2)))
    return {"structure": [(at, at + 1) for at in tokens]}


def _ops(rng, lengths, sliding):
    ops, rows = [], len(lengths)
    unused = rng.sample(range(200, 300), 100)
    kinds = ["step", "step", "step", "turn", "turn", "rows", "save", "copy", "detour", "crop"]
    for _ in range(rng.randint(1, 7)):
        kind = rng.choice(kinds)
        if kind == "step":
            for _ in range(rng.randint(1, 6)):
                ops.append(("read", _turn(rng, rows, 1, sliding, unused)))
        elif kind in ("turn", "detour"):
            turn = _turn(rng, rows, rng.randint(2, 6), sliding, unused)
            ops.append(("read" if kind == "turn" else "detour", turn))
        elif kind == "crop":
            ops.append(("crop", rng.randint(1, 3)))
        elif kind == "rows":
            chosen = [rng.randrange(rows) for _ in range(rng.choice((rows, rng.randint(1, 3))))]
            ops.append(("rows", chosen))
            rows = len(chosen)
        else:
            ops.append((kind, None))
    return ops


def _turn(rng, rows, columns, sliding, unused):
    """New tokens of every prompt; padding stands where a caller may put it.

    None where layers slide: transformers' windows count padding inside a conversation.
    """
    ids = _ids(rng, rows, columns, [unused.pop() for _ in range(columns)])
    if sliding or rng.random() < 0.5:
        return ids, torch.ones(rows, columns, dtype=torch.bool)
    counts = [rng.choice((0, 1, columns, rng.randint(0, columns))) for _ in range(rows)]
    counts[rng.randrange(rows)] = columns
    own, at = torch.tensor(counts)[:, None], torch.arange(columns)
    return ids, at < own if rng.random() < 0.3 else at >= columns - own


# Playing


@remembered
def model(architecture):
    return models.tiny(architecture)


@contextmanager
def exact():
    """Scores in float64, so that prompts differ by what is done, not by the order of sums."""
    single, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    kind, torch.float = torch.float, torch.float64  # transformers 5.17 asks for it by this name
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float, torch.float = single, kind
        torch.set_default_dtype(torch.float32)


def _cache(net, case, rows, count):
    keep, spans = case.keep, case.spans
    if isinstance(keep, str) and keep.endswith("KiB"):  # of the whole batch
        keep = f"{int(keep[:-3]) * count // len(case.passes[0][0])}KiB"
    if spans is not None:
        spans = spans[rows] if isinstance(rows, slice) else [spans[rows]]
    prompt = None
    chunks = case.settings.get("chunks") or case.settings.get("preset") == "paper"
    if chunks or len(case.passes) > 1:
        masks = torch.cat([mask for _, mask in case.passes], dim=1)
        prompt = masks.shape[1] if isinstance(rows, slice) else int(masks[rows].sum())
    return kvtrim.Cache(net, case.method, keep, spans=spans, prompt_tokens=prompt, **case.settings)


def together(case):
    """The whole batch, as a caller feeds it."""
    net, out = model(case.architecture), Played()
    cache = _cache(net, case, slice(None), len(case.passes[0][0]))
    real = torch.zeros(len(case.passes[0][0]), 0, dtype=torch.bool)
    steps = [*(("read", part) for part in case.passes), *case.ops]
    since_prompt = 0
    with torch.no_grad(), kvtrim.attach(net), tempfile.TemporaryDirectory() as folder:
        for number, (kind, given) in enumerate(steps):
            logits = None
            if kind in ("read", "detour"):
                ids, mask = given
                mark = cache.mark() if kind == "detour" else None
                whole = torch.cat([real, mask], dim=1)
                where = (whole.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                padded = {"attention_mask": whole.long(), "position_ids": where}
                given = {} if bool(whole.all()) else padded
                logits = net(ids, past_key_values=cache, **given).logits
                if mark is not None:
                    cache.rewind(mark)
                    logits = None
                else:
                    real = whole
                    if number >= len(case.passes):
                        since_prompt += ids.shape[1]
            elif kind == "crop":
                before = held(cache)
                if given > since_prompt:
                    out.refused.add(number)
                else:
                    try:
                        cache.crop(-given)
                        real, since_prompt = real[:, :-given], since_prompt - given
                    except KvtrimError:
                        out.refused.add(number)
                        assert held(cache) == before, "a refused crop changed the cache"
            elif kind == "rows":
                cache.batch_select_indices(torch.tensor(given))
                real = real[given]
            else:
                cache = _again(cache, net, kind, folder)
            out.held.append(held(cache))
            out.logits.append(None if logits is None else _real_logits(cache, logits, mask))
    return out


def alone(case, row, path, refused):
    """One prompt by itself; `path` names its row at each step of the batch."""
    net, out = model(case.architecture), Played()
    cache = _cache(net, case, row, 1)
    narrows = cache.method.propagation.narrows
    steps = [*(("read", part) for part in case.passes), *case.ops]
    with torch.no_grad(), kvtrim.attach(net), tempfile.TemporaryDirectory() as folder:
        for number, (kind, given) in enumerate(steps):
            at, logits = path[number], None
            if kind in ("read", "detour"):
                ids = given[0][at : at + 1, given[1][at]]
                if ids.numel() and kind == "detour":
                    mark = cache.mark()
                    net(ids, past_key_values=cache)
                    cache.rewind(mark)
                elif ids.numel():
                    logits = _watched(net, cache, ids, out)
                    if narrows and not out.held:
                        logits = logits[-1:]
            elif kind == "crop" and number not in refused:
                count = _tokens_in_last(steps[:number], path, refused, given)
                if count:
                    cache.crop(-count)
                    for each in (out.tokens, out.sights, out.expected):
                        del each[-count:]
            elif kind not in ("crop", "rows"):
                cache = _again(cache, net, kind, folder)
            out.held.append(held(cache)[0] if cache.seen else None)
            out.logits.append(logits)
    return out, cache


def _tokens_in_last(steps, path, refused, columns):
    """How many of a prompt's own tokens stand in the newest columns."""
    real = []
    for number, (kind, given) in enumerate(steps):
        if kind == "read":
            real += given[1][path[number]].tolist()
        elif kind == "crop" and number not in refused:
            del real[-given:]
    return sum(real[-columns:])


def _again(cache, net, kind, folder):
    if kind == "copy":
        return cache.copy()
    cache.save(Path(folder) / "cache.kv")
    return kvtrim.load_cache(Path(folder) / "cache.kv", net)


def _watched(net, cache, ids, out):
    """One pass over a prompt alone, and what each of its tokens saw."""
    start, new = len(out.tokens), ids.shape[1]
    before, first = held(cache)[0] if cache.seen else None, not cache.seen
    ahead = cache.method.schedule.ahead and not cache.session.in_prompt

    def look(number, call):
        part = cache.session.narrowing
        if first and part is not None:
            out.read[number] = part.columns[0].tolist()

    cache.session._tap = look
    logits = net(ids, past_key_values=cache).logits[0]
    cache.session._tap = None
    source = before
    if ahead:  # what is left is what they saw
        left = held(cache)[0]
        source = [[[p for p in head if p < start] for head in layer] for layer in left]
    for at in range(start, start + new):
        own = list(range(start, at + 1))
        seen = None if source is None else [[{*head, *own} for head in layer] for layer in source]
        out.sights.append(seen if seen is not None else {*own})
    out.tokens += ids[0].tolist()
    narrow = out.read.get(len(cache.managed) - 1) if first else None
    places = narrow if narrow is not None else range(new)
    rows = dict(zip(places, logits, strict=True))
    out.expected += [rows.get(at) for at in range(new)]
    return logits


def held(cache):
    if not cache.seen:
        return []
    rows = range(len(cache.session.state.reading.lengths))
    return [models.positions(cache, row) for row in rows]


def _real_logits(cache, logits, mask):
    """Each prompt's logits of its own tokens; of the last column alone where some are missing."""
    if logits.shape[1] != mask.shape[1]:
        pairs = zip(logits, mask, strict=True)
        return [own[-1:] if bool(real[-1]) else None for own, real in pairs]
    return [own[real] for own, real in zip(logits, mask, strict=True)]


# Judging


def judge(case):
    """What is wrong with a case, in words; None if nothing is.

    Raises:
        KvtrimError: the case is refused.
    """
    with exact():
        batch = together(case)
        rows = len(batch.held[-1])
        for last in range(rows):
            path = _path(case, last)
            lone, cache = alone(case, path[0], path, batch.refused)
            wrong = _apart(case, batch, lone, [*path[1:], last]) or _unmasked(case, lone, cache)
            if wrong:
                return f"row {path[0]}: {wrong}"
    return None


def _path(case, last):
    """The row of a prompt before every step, from its row at the end."""
    steps, path = [*case.passes, *case.ops], []
    for step in reversed(steps):
        if step[0] == "rows":
            last = step[1][last]
        path.append(last)
    return path[::-1]


def _apart(case, batch, lone, after):
    """Where the batch and the prompt alone go different ways."""
    for number, row in enumerate(after):
        own = lone.held[number]
        if own is not None and batch.held[number][row] != own:
            return f"step {number}: it keeps other entries in the batch than alone"
        pair = batch.logits[number] and batch.logits[number][row], lone.logits[number]
        if pair[0] is None or pair[1] is None or not len(pair[0]):
            continue
        count = min(map(len, pair))
        apart = float((pair[0][-count:] - pair[1][-count:]).abs().max())
        if not apart < TOLERANCE:
            return f"step {number}: logits in the batch and alone differ by {apart:.1e}"
    return None


def _unmasked(case, lone, cache):
    """Where a prompt's logits are not those of the model masked to what was held."""
    net, method = model(case.architecture), cache.method
    if method.positions == "rolled" or method.refit.changes:
        return None  # keys or values are others than the model made
    kept = range(len(lone.tokens))
    if method.propagation.restarts and lone.read:  # the chosen tokens close up
        prompt = sum(isinstance(seen, set) for seen in lone.sights)  # restarts read it at once
        kept = [*lone.read[0], *range(prompt, len(lone.tokens))]
    place = {position: slot for slot, position in enumerate(kept)}
    n, heads, masks = len(place), net.config.num_attention_heads, {}
    for layer in range(net.config.num_hidden_layers):
        if layer not in cache.managed:
            masks[layer] = oracles.causal(n, models.WINDOW)
            continue
        number = cache.managed.index(layer)
        mask = torch.zeros(heads, n, n, dtype=torch.bool)
        for position, slot in place.items():
            seen = lone.sights[position]
            if isinstance(seen, set):  # a token of the first pass
                read = lone.read.get(number)
                own = seen if read is None else seen & {*read}
                mask[:, slot, [place[p] for p in own if p in place]] = True
                continue
            group = heads // len(seen[number])
            for head in range(heads):
                mask[head, slot, [place[p] for p in seen[number][head // group]]] = True
        masks[layer] = mask
    ids = torch.tensor([[lone.tokens[position] for position in kept]])
    logits = oracles.run_masked(net, ids, masks)[0]
    for position, slot in place.items():
        if lone.expected[position] is None:
            continue
        apart = float((logits[slot] - lone.expected[position]).abs().max())
        if not apart < TOLERANCE:
            return f"token {position}: logits differ by {apart:.1e} from the masked model's"
    return None


@dataclass
class Tally:
    """How many cases came out how."""

    right: int = 0
    refused: int = 0
    faults: list = field(default_factory=list)  # (number, what is wrong)


def run(seed, numbers, tell=lambda number, wrong: None):
    """Judge these cases."""
    tally = Tally()
    for number in numbers:
        case, _ = draw(seed, number)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "keep=.* was applied to the prompt")
                wrong = judge(case)
        except KvtrimError:
            tally.refused += 1
            continue
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:120]
            wrong = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {text}"
        if wrong:
            tally.faults.append((number, wrong))
            tell(number, wrong)
        else:
            tally.right += 1
    return tally


def describe(case):
    lengths = [int(mask.sum()) for mask in torch.cat([m for _, m in case.passes], dim=1)]
    ops = [k if k != "read" else f"read {a[1].sum(1).tolist()}" for k, a in case.ops]
    return (
        f"{case.architecture} {case.method} keep={case.keep} {case.settings} "
        f"prompts {lengths} in {len(case.passes)} passes, then {ops}"
    )
