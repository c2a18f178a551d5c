"""Least squares: kept values (and biases) so that attention answers as over the full cache.

Rule:  A [Q, S] are the weights of the reference queries over the kept entries, O [Q, E] their
       answers over all entries: V' = V + argmin |A D - (O - A V)|^2 + ridge t |D|^2, t the mean
       diagonal of A'A. With `bias` a weight w >= 0 per entry comes first, whose log is added to
       its logit: |E w - 1|^2 + ridge t |w - 1|^2 least, E what an entry has of the full cache's
       mass, so that what is read later finds the mass that it would have found.
Paper: Attention Matching, https://arxiv.org/abs/2602.16284 (weights by non-negative least squares,
       then values); GRKV, https://arxiv.org/abs/2605.31105.
Code:  adamzweiger/compaction@2e59cc8, algorithms/highest_attention_keys.py.
Ours:  ridge around what the model wrote; every fifth run of queries is held out, chooses the ridge
       of each head, and nothing is changed where no ridge does better on it; reference queries
       need no probe: the prompt's own, turned to a position behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from kvtrim.errors import UsageError
from kvtrim.methods.ranges import Positive, Range, Tokens
from kvtrim.methods.refit.base import Refit
from kvtrim.types import Aim, Bool, Counts, Float, Refitted, Tensor

_RUN, _OUT_OF = 8, 5  # of every 5 runs of 8 queries one is held out
_AT_ONCE = 128  # queries whose weights over the full cache exist at once
_STEPS = 12  # of the projected gradient
_LEAST = 1e-4  # smallest weight of an entry

Queries = Annotated[int, Range(_RUN * _OUT_OF)]
"""So many that some are held out."""


@dataclass(frozen=True)
class LeastSquares(Refit):
    bias: bool = False  # entries get a weight too, added to their logits as its log
    queries: Queries = 512  # reference queries per KV head, its query heads taken together
    behind: Tokens = 64  # positions behind the prompt that its own queries are turned to
    ridges: tuple[Positive, ...] = (0.003, 0.03, 0.3)  # tried, shares of the Gram's mean diagonal

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridges:
            raise UsageError("ridges is empty: give one or more numbers above 0")

    @property
    def biases(self) -> bool:
        return self.bias

    def fitted(
        self,
        aim: Aim,
        keys: Float[Tensor, "K S D"],
        values: Float[Tensor, "K S E"],
        lengths: Counts,
        scale: float,
        softcap: float | None,
    ) -> Refitted:
        """See `Refit.fitted`; in fp32, all heads in one batch."""
        slots = torch.arange(keys.shape[1]) < lengths[0][:, None]
        inside = slots.to(keys.device)  # [K, S]
        logits = _logits(aim.queries.float(), keys.float(), scale, softcap)
        logits = logits.masked_fill(~inside[:, None], -torch.inf)
        old = values.float().masked_fill(~inside[..., None], 0)
        held_out = _held_out(logits.shape[1], logits.device)
        plain = _errors(aim.out - logits.softmax(dim=-1) @ old, held_out)
        bias = None
        if self.bias:
            bias = self._bias((logits - aim.lse[..., None]).exp(), inside, held_out)
            logits = logits + bias[:, None]
        new, errors = self._values(logits.softmax(dim=-1), aim.out, old, inside, held_out)
        worse = errors > plain  # only biases can be the reason
        new = torch.where(worse[:, None, None], old, new)
        if bias is not None:
            bias = bias.masked_fill(worse[:, None], 0)
        return Refitted(new.to(values.dtype), bias)

    def _values(
        self,
        weights: Float[Tensor, "K Q S"],
        out: Float[Tensor, "K Q E"],
        old: Float[Tensor, "K S E"],
        inside: Bool[Tensor, "K S"],
        held_out: Bool[Tensor, " Q"],
    ) -> tuple[Float[Tensor, "K S E"], Float[Tensor, " K"]]:
        """Values by the ridge that is best for each head, and their errors on held-out queries."""
        gap = out - weights @ old
        a, b = weights[:, ~held_out], gap[:, ~held_out]
        best, least = torch.zeros_like(old), _errors(gap, held_out)
        for change in _ridged(a, b, inside, self.ridges):
            errors = _errors(gap[:, held_out] - weights[:, held_out] @ change)
            better = errors < least
            best = torch.where(better[:, None, None], change, best)
            least = torch.where(better, errors, least)
        return old + best, least

    def _bias(
        self,
        shares: Float[Tensor, "K Q S"],
        inside: Bool[Tensor, "K S"],
        held_out: Bool[Tensor, " Q"],
    ) -> Float[Tensor, "K S"]:
        """Logs of the weights under which the entries have the full cache's mass."""
        best, own = inside.float(), shares[:, held_out]
        least = _errors(1 - (own @ best[..., None]))
        found = _nonnegative(shares[:, ~held_out], inside, self.ridges)
        for weight in found.unbind(-1):
            errors = _errors(1 - (own @ weight[..., None]))
            better = errors < least
            best = torch.where(better[:, None], weight, best)
            least = torch.where(better, errors, least)
        return best.clamp(min=_LEAST).log().masked_fill(~inside, 0)


def answered(
    queries: Float[Tensor, "K Q D"],
    keys: Float[Tensor, "K N D"],
    values: Float[Tensor, "K N E"],
    scale: float,
    softcap: float | None = None,
) -> Aim:
    """What all entries of one layer of one prompt answer to queries that stand behind them."""
    queries, keys, values = queries.float(), keys.float(), values.float()
    out, lse = [], []
    for part in queries.split(_AT_ONCE, dim=1):
        logits = _logits(part, keys, scale, softcap)
        own = logits.logsumexp(dim=-1)
        out.append((logits - own[..., None]).exp() @ values)
        lse.append(own)
    return Aim(queries, torch.cat(out, dim=1), torch.cat(lse, dim=1))


def _logits(
    queries: Float[Tensor, "K Q D"],
    keys: Float[Tensor, "K S D"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "K Q S"]:
    logits = (queries * scale) @ keys.mT
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _held_out(count: int, device: torch.device) -> Bool[Tensor, " Q"]:
    """Runs of neighbouring queries that nothing is fitted on; they are in order of position."""
    runs = torch.arange(count, device=device) // _RUN
    return runs % _OUT_OF == _OUT_OF - 1


def _errors(
    gap: Float[Tensor, "K Q E"], held_out: Bool[Tensor, " Q"] | None = None
) -> Float[Tensor, " K"]:
    """Sums of squares per head, over the held-out queries if they are not alone."""
    return (gap if held_out is None else gap[:, held_out]).square().sum(dim=(1, 2))


def _ridged(
    a: Float[Tensor, "K Q S"],
    b: Float[Tensor, "K Q E"],
    inside: Bool[Tensor, "K S"],
    ridges: Sequence[float],
) -> Iterator[Float[Tensor, "K S E"]]:
    """The x with |a x - b|^2 + ridge t |x|^2 least, for each ridge; 0 where that fails.

    By way of the smaller of the two Gram matrices, which gives the same.
    """
    few = a.shape[2] <= a.shape[1]
    gram, right = (a.mT @ a, a.mT @ b) if few else (a @ a.mT, b)
    unit = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / inside.sum(dim=-1).clamp(min=1)
    eye = torch.eye(gram.shape[-1], device=gram.device)
    for ridge in ridges:
        lifted = gram + (ridge * unit).clamp(min=1e-12)[:, None, None] * eye
        factor, failed = torch.linalg.cholesky_ex(lifted)
        found = torch.cholesky_solve(right, factor)
        found = found if few else a.mT @ found
        yield found.masked_fill((failed != 0)[:, None, None], 0)


def _nonnegative(
    shares: Float[Tensor, "K Q S"], inside: Bool[Tensor, "K S"], ridges: Sequence[float]
) -> Float[Tensor, "K S R"]:
    """The w >= 0 with |shares w - 1|^2 + ridge t |w - 1|^2 least, by projected gradients (FISTA).

    They begin where weights of any sign are best, cut off at 0. In units of each column's length,
    so that rare and heavy entries move alike; t is the mean squared length. What is not inside
    stays 0. All ridges go in one product.
    """
    squares = shares.square().sum(dim=1)[..., None]  # [K, S, 1]
    unit = squares.sum(dim=1, keepdim=True) / inside.sum(dim=1).clamp(min=1)[:, None, None]
    pull = (unit * torch.tensor(ridges, device=shares.device)).clamp(min=1e-12)  # [K, 1, R]
    size = (squares + pull).sqrt()  # [K, S, R]
    pull, step = pull / size.square(), 1 / (_largest(shares, size) + 1)
    start = inside[..., None] * size
    missing = 1 - shares @ inside[..., None].float()
    free = torch.cat([*_ridged(shares, missing, inside, ridges)], dim=-1)
    weight = ahead = ((1 + free).clamp(min=0) * inside[..., None]) * size
    momentum = 1.0
    for _ in range(_STEPS):
        slope = shares.mT @ (shares @ (ahead / size) - 1) / size + pull * (ahead - start)
        moved = (ahead - step * slope).clamp(min=0) * inside[..., None]
        later = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / later * (moved - weight)
        weight, momentum = moved, later
    return weight / size


def _largest(
    shares: Float[Tensor, "K Q S"], size: Float[Tensor, "K S R"]
) -> Float[Tensor, "K 1 R"]:
    """A bound on the largest eigenvalue of each Gram matrix of columns in units of `size`.

    By power iteration, and a margin.
    """
    vector = torch.ones_like(size)
    found = vector[:, :1]
    for _ in range(6):
        vector = shares.mT @ (shares @ (vector / size)) / size
        found = vector.norm(dim=1, keepdim=True).clamp(min=1e-30)
        vector = vector / found
    return 1.5 * found
