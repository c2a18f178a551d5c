"""Head scores: how much each query head helps to find a needle, measured while a model answers.

A needle is planted in filler, the model reads it with a full cache and answers greedily, with as
many tokens as the right answer has. At each new token, the last query's attention is looked at in
every head. With n tokens of the needle:

    copy (R):    + 1/n if the position attended most is in the needle and holds the new token
    reason (R2): + attention/n of each of the n most attended positions that is in the needle

    kvzip:       the largest of KVzip's scores of any token of the prompt, for the KV head

Sums over an answer are one sample. With kvzip nothing is answered and every prompt counts; else it
counts if the answer is right: ROUGE-1 recall of the needle
above 0.5 (copy), QA-F1 above 0.5 (reason).

Paper: Fu et al. 2024 (HeadKV), https://arxiv.org/abs/2410.19258, section 3.1; R is Wu et al. 2024,
       https://arxiv.org/abs/2404.15574.
Code:  nightdessert/Retrieval_Head@1012272, FYYFU/HeadKV@0862a09 (which also multiplies R2 by 10
       and divides by the tokens of the expected answer).
Ours:  needles and filler are made of words from a seed; the answer's first words are given, so
       that also small models answer briefly; ROUGE without stemming.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kvtrim.bench.calibrate.echo import scores_of
from kvtrim.bench.calibrate.needles import plant
from kvtrim.bench.provenance import provenance
from kvtrim.engine.layer import Call
from kvtrim.errors import ModelError, UsageError
from kvtrim.hf.attach import attach
from kvtrim.hf.base import cache_keyword
from kvtrim.hf.cache import Cache
from kvtrim.hf.generate import read
from kvtrim.hf.models import fingerprint
from kvtrim.hf.models.architectures import window
from kvtrim.hf.replay import record as read_once
from kvtrim.methods.policies import ops
from kvtrim.prompts import frame, repeat_words
from kvtrim.tasks import haystack, scorers
from kvtrim.types import Float, Int, LayerView, Tensor

Score = Literal["copy", "reason", "kvzip"]
Report = Callable[[str, int, int], None]

RIGHT = 0.5  # an answer that matches better than this counts
_ANSWER = 64  # tokens of an answer at most
_GOLDEN = 0.6180339887  # multiples of it, modulo 1, are spread evenly however many there are


@dataclass(frozen=True)
class Plan:
    """What is asked of a model."""

    score: Score = "reason"
    puzzle: haystack.Puzzle = "two-step"  # of the reason score
    prompts: int = 24
    lengths: tuple[int, ...] = (1000, 1500, 2000)
    seed: int = 0
    chat: bool | None = None

    @property
    def kind(self) -> haystack.Kind:
        """The riddles that go with the score."""
        return "copy" if self.score == "copy" else self.puzzle


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer."""

    tokens: int
    depth: float
    expected: str
    answer: str
    match: float
    counted: bool
    misled: bool  # it answered what the puzzle's other sentence says


@dataclass(frozen=True)
class Measured:
    """Scores per query head, as the table's file has them, and the samples they come from."""

    table: dict[str, list[float]]
    samples: list[Sample]
    layers: int
    heads: int

    @property
    def counted(self) -> int:
        """Prompts that were answered right."""
        return sum(sample.counted for sample in self.samples)

    def means(self) -> Float[Tensor, "L H"]:
        """Each query head's mean score."""
        rows = torch.tensor(list(self.table.values()), dtype=torch.float64)
        return rows.mean(dim=-1).view(self.layers, self.heads)

    @property
    def misled(self) -> int:
        """Prompts that were answered with what the puzzle's other sentence says."""
        return sum(sample.misled for sample in self.samples)


def measure(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    text: str | None = None,
    report: Report = lambda *_: None,
) -> Measured:
    """Score every query head of a model.

    Args:
        text: the haystack; by default filler is made from the seed.
        report: told what goes on, how many prompts are done, and out of how many.

    Raises:
        UsageError: a prompt longer than the model's window.
        ModelError: not one answer was right, or no head had a part in those that were.
    """
    most = window(model)
    if max(plan.lengths) + _ANSWER > most:
        raise UsageError(
            f"prompts of {max(plan.lengths)} + {_ANSWER} tokens exceed the window, {most}; ask "
            "for a smaller --length"
        )
    samples, scored = [], []
    with attach(model):
        for number in range(plan.prompts):
            report(f"prompt {number + 1}, {len(scored)} answered right", number, plan.prompts)
            sample, scores = _sample(model, tokenizer, plan, number, text)
            samples.append(sample)
            scored += [scores] if sample.counted else []
    if not any(bool(scores.any()) for scores in scored):
        raise ModelError(
            f"{len(scored)} of {plan.prompts} prompts were answered right, and no head scored "
            "above 0; try more --prompts, a smaller --length, --puzzle contrast or --score copy"
        )
    table = torch.stack(scored, dim=-1)  # [L, H, samples]
    lists = {
        f"{layer}-{head}": [round(score, 6) for score in own.tolist()]
        for layer, heads in enumerate(table)
        for head, own in enumerate(heads)
    }
    return Measured(lists, samples, *table.shape[:2])


def record(
    model: Any, tokenizer: Any, name: str, plan: Plan, text: str | None, measured: Measured
) -> dict[str, Any]:
    """Everything about a measurement but the scores, ready for JSON."""
    own = asdict(plan) | {"puzzle": plan.kind, "model": name}
    own["haystack"] = "generated" if text is None else f"sha256 {_sha256(text)}"
    own |= {"identity": fingerprint.identity(model), "fingerprint": fingerprint.of_model(model)}
    own |= {"tokenizer": fingerprint.of_tokenizer(tokenizer), "machine": provenance(model.device)}
    for figure in ("layers", "heads", "counted", "misled"):
        own[figure] = getattr(measured, figure)
    return own | {"samples": [asdict(sample) for sample in measured.samples]}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sample(
    model: Any, tokenizer: Any, plan: Plan, number: int, text: str | None
) -> tuple[Sample, Float[Tensor, "L H"]]:
    """One prompt: its record, and what each head scored."""
    draw = random.Random(f"{plan.seed}-{number}")
    length = plan.lengths[number % len(plan.lengths)]
    depth = (0.5 + number * _GOLDEN) % 1
    riddle = haystack.riddle(plan.kind, draw)
    source = haystack.filler(draw) if text is None else haystack.sentences(text, draw)
    planted = plant(tokenizer, riddle, source, length, depth, plan.chat)
    if plan.score == "kvzip":
        unanswered = Sample(len(planted.ids), round(depth, 3), "", "", 0, True, False)
        return unanswered, kvzip_scores(model, tokenizer, planted.ids, plan.chat)
    step = retrieval_score if plan.score == "copy" else reasoning_score
    fed, total = list(planted.ids), torch.zeros(())
    for token, weights in answer(model, planted.ids, planted.steps):
        total = total + step(weights, torch.tensor(fed), token, planted.needle)
        fed.append(token)
        if token == tokenizer.eos_token_id:
            break
    said = tokenizer.decode(fed[len(planted.ids) :], skip_special_tokens=True).strip()
    rate = scorers.rouge1_recall if plan.score == "copy" else scorers.token_f1
    match = rate(said, [riddle.answer])
    misled = riddle.decoy is not None and rate(said, [riddle.decoy]) > RIGHT
    done = len(planted.ids), round(depth, 3), riddle.answer, said, round(match, 3)
    return Sample(*done, counted=match > RIGHT, misled=misled), total


def kvzip_scores(
    model: Any, tokenizer: Any, ids: Sequence[int], chat: bool | None = None
) -> Float[Tensor, "L H"]:
    """The largest of KVzip's scores that any token of a prompt has, by query head."""
    words = repeat_words(tokenizer, frame(tokenizer, chat))
    with torch.no_grad():
        recording = read_once(model, torch.tensor([list(ids)], device=model.device), None, words)
        found = scores_of(recording, "kvzip")
    most = torch.stack([scores.masked_fill(scores.isinf(), 0).amax(dim=-1) for scores in found])
    group = recording.calls[0].queries.shape[1] // most.shape[1]
    return most.double().cpu().repeat_interleave(group, dim=1)


def answer(
    model: Any, ids: Sequence[int], most: int
) -> Iterator[tuple[int, list[Float[Tensor, "H S"]]]]:
    """Greedy tokens after a prompt, each with the attention of the query that chose it.

    Attention is per managed layer, over the prompt and the tokens before. The model must be
    attached.
    """
    calls: dict[int, Call] = {}
    cache = Cache(model, "full", tap=calls.__setitem__)
    read(model, torch.tensor([list(ids[:-1])], device=model.device), cache)
    token = ids[-1]
    for _ in range(most):
        fed = torch.tensor([[token]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=fed, **cache_keyword(cache), logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        yield token, [_attention(cache, index, calls[index]) for index in sorted(calls)]


def _attention(cache: Cache, index: int, call: Call) -> Float[Tensor, "H S"]:
    """One layer's attention of its newest query over everything read."""
    store = cache.session.state.layers[index].store
    assert store is not None
    dense, _ = store.dense()
    view = LayerView(
        index=index,
        layers=len(cache.managed),
        keep=0,
        tokens=cache.seen,
        queries=call.queries,
        keys=dense["keys"],
        values=dense["values"],
        positions=dense["positions"],
        scale=call.scale,
        softcap=call.softcap,
    )
    return ops.attention(view, last=1)[0, :, 0].cpu()


def retrieval_score(
    layers: list[Float[Tensor, "H S"]], ids: Int[Tensor, " S"], token: int, needle: range
) -> Float[Tensor, "L H"]:
    """R of one step: 1/n where a head looks most at the needle's own copy of the new token."""
    top = torch.stack([weights.argmax(dim=-1) for weights in layers])  # [L, H]
    inside = (top >= needle.start) & (top < needle.stop)
    return (inside & (ids[top] == token)).double() / len(needle)


def reasoning_score(
    layers: list[Float[Tensor, "H S"]], ids: Int[Tensor, " S"], token: int, needle: range
) -> Float[Tensor, "L H"]:
    """R2 of one step: attention/n of those of the n most attended positions in the needle."""
    scores = []
    for weights in layers:
        top = weights.double().topk(len(needle), dim=-1)
        inside = (top.indices >= needle.start) & (top.indices < needle.stop)
        scores.append((top.values * inside).sum(dim=-1) / len(needle))
    return torch.stack(scores)
