"""What follows a prompt: the right answer, fed to see how likely it is, and the model's own.

Continuations of several caches share passes: see `kvtrim.hf.batch`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtrim.hf.base import BaseCache, cache_keyword
from kvtrim.hf.batch import join, positions
from kvtrim.hf.generate import likelihoods
from kvtrim.types import Float, Int, Tensor

_LOGITS = 1 << 26  # numbers that one pass over an answer may give: rows x tokens x vocabulary
_MORE = 8  # tokens looked at behind the longest stop string


@dataclass
class Branch:
    """Caches after one prompt, as one batch, and what they make of its end."""

    cache: BaseCache
    logits: Float[Tensor, "R V"]  # of the token that comes next
    full: bool = False  # the first row is the full cache, from which divergence is counted

    def row(self, number: int) -> "Branch":
        """One row; the others are gone from the cache."""
        self.cache.batch_select_indices(torch.tensor([number]))
        return Branch(self.cache, self.logits[number : number + 1], self.full and not number)

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.logits.shape[0]


@dataclass(frozen=True)
class Fit:
    """How likely the right answer is."""

    loss: float | None  # nats per token
    kl: float | None  # mean divergence from the full cache's distributions, nats
    agreement: float | None = None  # share of tokens that the full cache finds likeliest as well


@dataclass
class Reference:
    """Log-probabilities [T, V] that the full cache gave to an answer's tokens, once known."""

    log: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str
    new_tokens: int
    stopped: str  # "eos", "stop" or "length"
    ids: tuple[int, ...] = ()


def make_branch(
    model: Any, caches: Sequence[BaseCache], logits: Sequence[Tensor], lead: list[int], tokens: int
) -> Branch:
    """Read what follows a compressed context, in one pass for all caches.

    Args:
        logits: [V] of the token after what each cache has read.
        lead: what follows; may be nothing.
        tokens: of the whole prompt.
    """
    cache = caches[0] if len(caches) == 1 else join(caches)
    cache.expect(tokens)
    if not lead:
        return Branch(cache, torch.stack([*logits]))
    ids = torch.tensor([lead] * len(caches), device=model.device)
    return Branch(cache, _feed(model, cache, ids, 1)[:, -1])


def fits(
    model: Any, branch: Branch, gold: list[int], skip: int, reference: Reference
) -> list[Fit]:
    """How likely an answer is to every row, which are left as they were.

    Args:
        skip: so many of its first tokens are not judged.
        reference: what divergence is counted from; set here where the first row is the full cache.
    """
    if len(gold) <= skip:
        return [Fit(None, None)] * branch.rows
    own = torch.tensor(gold, device=branch.logits.device)
    loss, kl, same = torch.zeros(3, branch.rows, dtype=torch.float64)
    first, done = [], 0
    for logits in _predictions(model, branch, own):
        drop = max(0, skip - done)
        at = slice(done + drop, done + logits.shape[1])
        done = at.stop
        for row in range(branch.rows if at.start < at.stop else 0):
            log, chosen = likelihoods(logits[row, drop:], own[at])
            loss[row] -= chosen.double().sum().cpu()
            if branch.full:
                first += [log] if row == 0 else []
                true = first[-1]
            elif reference.log is not None:
                true = reference.log[at.start - skip : at.stop - skip]
            else:
                continue
            kl[row] += _divergence(true, log)
            same[row] += (true.argmax(dim=-1) == log.argmax(dim=-1)).sum().cpu()
    reference.log = torch.cat(first) if branch.full else reference.log
    means = torch.stack([loss, kl, same], dim=1) / (len(gold) - skip)
    if reference.log is None:
        return [Fit(one, None) for one, *_ in means.tolist()]
    return [Fit(*row) for row in means.tolist()]


def _divergence(true: Float[Tensor, "T V"], log: Float[Tensor, "T V"]) -> Tensor:
    """Of these log-probabilities from the true ones, summed over tokens."""
    return (true.exp() * (true - log)).sum().double().cpu()


def merge(branches: Sequence[Branch]) -> Branch:
    """Branches of several prompts as one."""
    if len(branches) == 1:
        return branches[0]
    return Branch(
        join([branch.cache for branch in branches]),
        torch.cat([branch.logits for branch in branches]),
    )


def answers(
    model: Any, tokenizer: Any, branch: Branch, most: int, stop: Sequence[str], least: int = 0
) -> list[Answer]:
    """Greedy answers until an end token, a stop string, or so many new tokens.

    No answer ends by itself before it has `least` of them: neither end tokens nor tokens with a
    stop string in them are taken before.
    """
    ends, cache, logits = _ends(model, tokenizer), branch.cache, branch.logits
    rows, written = list(range(branch.rows)), [[] for _ in range(branch.rows)]
    why: dict[int, str] = {}
    for number in range(most):
        if number < least:
            logits = _without_ends(tokenizer, logits, ends, stop)
        tokens = logits.argmax(dim=-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in why:
                written[row].append(token)
                why |= _stop_reason(tokenizer, row, written[row], ends, most, stop)
        going = [place for place, row in enumerate(rows) if row not in why]
        if not going:
            break
        if 2 * len(going) <= len(rows):  # those that are done cost time, leaving them out as well
            chosen = torch.tensor(going, device=tokens.device)
            cache.batch_select_indices(chosen)
            rows, tokens = [rows[place] for place in going], tokens[chosen]
        logits = _feed(model, cache, tokens[:, None], 1)[:, -1]
    return [
        Answer(_text(tokenizer, ids, stop), len(ids), why[row], tuple(ids))
        for row, ids in enumerate(written)
    ]


def _without_ends(
    tokenizer: Any, logits: Float[Tensor, "R V"], ends: set[int], stop: Sequence[str]
) -> Float[Tensor, "R V"]:
    """Logits in which no row's likeliest token ends its answer."""
    own = torch.tensor([*ends], dtype=torch.long, device=logits.device)
    logits = logits.index_fill(-1, own, -torch.inf)
    while stop:
        tokens = logits.argmax(dim=-1).tolist()
        stops = [_cut(_decode(tokenizer, [token]), stop) is not None for token in tokens]
        if not any(stops):
            break
        rows = [row for row, one in enumerate(stops) if one]
        logits[rows, [tokens[row] for row in rows]] = -torch.inf
    return logits


def _feed(
    model: Any, cache: BaseCache, ids: Int[Tensor, "R Q"], keep: int
) -> Float[Tensor, "R Q V"]:
    """Logits of the last `keep` of these tokens (0: of all of them)."""
    at = positions(cache, ids.shape[1]).to(ids.device)
    with torch.no_grad():
        return model(
            input_ids=ids, position_ids=at, **cache_keyword(cache), logits_to_keep=keep
        ).logits


def _predictions(model: Any, branch: Branch, gold: Int[Tensor, " T"]) -> Iterator[Tensor]:
    """Logits [R, Q, V] of an answer's tokens, some at a time; the cache is left as it was."""
    yield branch.logits[:, None]
    if len(gold) == 1:
        return
    size = branch.logits.shape[0] * branch.logits.shape[1]
    mark = branch.cache.mark()
    try:
        for part in gold[:-1].split(max(1, _LOGITS // size)):
            yield _feed(model, branch.cache, part.expand(branch.rows, -1), 0)
    finally:
        branch.cache.rewind(mark)


def _stop_reason(
    tokenizer: Any, row: int, ids: list[int], ends: set[int], most: int, stop: Sequence[str]
) -> dict[int, str]:
    """Why this row ends here, if it does."""
    if ids[-1] in ends:
        return {row: "eos"}
    if stop:
        tail = ids[-(max(map(len, stop)) + _MORE) :]
        if _cut(_decode(tokenizer, tail), stop) is not None:
            return {row: "stop"}
    return {row: "length"} if len(ids) >= most else {}


def _text(tokenizer: Any, ids: list[int], stop: Sequence[str]) -> str:
    """The answer up to the first stop string."""
    text = _decode(tokenizer, ids)
    return text[: _cut(text, stop)]


def _cut(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer, as model and tokenizer have it."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
