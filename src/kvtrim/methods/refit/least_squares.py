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
       need no probe: the prompt's own, turned to a position behind it; where the question is known
       (the policy looks at the last queries), its queries are among them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from kvtrim.errors import UsageError
from kvtrim.kernels.parts import attend_part
from kvtrim.methods.ranges import Positive, Range, Tokens
from kvtrim.methods.refit.base import Refit
from kvtrim.types import Aim, Bool, Counts, Float, Refitted, Tensor

_RUN, _OUT_OF = 8, 5  # of every 5 runs of 8 queries one is held out
_STEPS = 8  # of the projected gradient
_LEAST = 1e-4  # smallest weight of an entry
_PULL = 0.001  # the ridge of the weights
_ROUNDING = 1e-4  # of what is missing, as a share

Queries = Annotated[int, Range(_RUN * _OUT_OF)]
"""So many that some are held out."""


@dataclass(frozen=True)
class LeastSquares(Refit):
    bias: bool = False  # entries get a weight too, added to their logits as its log
    queries: Queries = 384  # reference queries per KV head, its query heads taken together
    behind: Tokens = 64  # positions behind the prompt that its own queries are turned to
    last: Tokens = 32  # of the prompt's last queries are added, as they are, where the scores come
    # from such queries, too
    ridges: tuple[Positive, ...] = (0.01, 0.1)  # tried, shares of the Gram's mean diagonal

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridges:
            raise UsageError("ridges is empty: give one or more numbers above 0")

    @property
    def biases(self) -> bool:
        return self.bias

    def fit(
        self,
        aim: Aim,
        keys: Float[Tensor, "K S D"],
        values: Float[Tensor, "K S E"],
        lengths: Counts,
        scale: float,
        softcap: float | None,
    ) -> Refitted:
        """See `Refit.fit`; in fp32, head by head, since they hold very different numbers."""
        new = values.clone()
        bias = values.new_zeros(values.shape[:2], dtype=torch.float32) if self.bias else None
        held_out = _held_out(aim.queries.shape[1], values.device)
        order = torch.cat([(~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]])
        fitted = len(order) - int(held_out.sum())
        queries, lse, out = (each[:, order] for each in (aim.queries, aim.lse, aim.out))
        for head, count in enumerate(lengths[0].tolist()):
            if count == 0:
                continue
            logits = _logits(queries[head], keys[head, :count].float(), scale, softcap)
            given = logits, lse[head], out[head], values[head, :count].float()
            became, own = self._head(*given, fitted)
            new[head, :count] = became.to(values.dtype)
            if bias is not None and own is not None:
                bias[head, :count] = own
        return Refitted(new, bias)

    def _head(
        self,
        logits: Float[Tensor, "Q S"],
        lse: Float[Tensor, " Q"],
        out: Float[Tensor, "Q E"],
        old: Float[Tensor, "S E"],
        fitted: int,
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, " S"] | None]:
        """One head's values and biases, from the first `fitted` queries; the rest are held out."""
        most = logits.amax(dim=-1, keepdim=True)
        mass = logits.sub_(most).exp_()  # and from here on changed in place: it is the large one
        total = mass.sum(dim=-1, keepdim=True)
        gap = out - mass @ old / total
        of_full = (most - lse[:, None]).exp()  # of the largest entry
        if not _misses(total * of_full, gap, out):
            return old, None  # nothing was lost
        plain, weight = _error(gap[fitted:]), None
        if self.bias:
            weight = _weight(mass.mul_(of_full.clamp(min=1e-30)), fitted)
            total = mass.mul_(weight).sum(dim=-1, keepdim=True)
        weights = mass.div_(total)
        if weight is not None:
            gap = out - weights @ old
        own, other, best = weights[fitted:], gap[fitted:], torch.zeros_like(old)
        least = _error(other)
        for change in _solve_ridges(weights[:fitted], gap[:fitted], self.ridges):
            error = _error(other - own @ change)
            best = torch.where(error < least, change, best)
            least = least.minimum(error)
        if weight is None:
            return old + best, None
        if bool(least > plain):
            return old, None  # the weights' doing
        return old + best, weight.log()


def aim_of(
    queries: Float[Tensor, "K Q D"],
    keys: Float[Tensor, "K N D"],
    values: Float[Tensor, "K N E"],
    scale: float,
    softcap: float | None = None,
) -> Aim:
    """What all entries of one layer of one prompt answer to queries that stand behind them."""
    queries, keys, values = (each.float()[None] for each in (queries, keys, values))
    out, lse = attend_part(queries, keys, values, scale, softcap)
    return Aim(queries[0], out[0], lse[0])


def _logits(
    queries: Float[Tensor, "*head Q D"],
    keys: Float[Tensor, "*head S D"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "*head Q S"]:
    logits = (queries * scale) @ keys.mT
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _held_out(count: int, device: torch.device) -> Bool[Tensor, " Q"]:
    """Runs of neighbouring queries that nothing is fitted on; they are in order of position."""
    runs = torch.arange(count, device=device) // _RUN
    return runs % _OUT_OF == _OUT_OF - 1


def _error(gap: Float[Tensor, "*rest"]) -> Float[Tensor, ""]:
    return gap.square().sum()


def _misses(
    total: Float[Tensor, "Q 1"], gap: Float[Tensor, "Q E"], out: Float[Tensor, "Q E"]
) -> bool:
    """Whether the entries lack anything of what the full cache has, beyond rounding.

    Args:
        total: their share of its mass.
    """
    lost = (1 - total).abs().max() > _ROUNDING
    return bool(lost | (_error(gap) > _ROUNDING**2 * _error(out)))


def _solve_ridges(
    a: Float[Tensor, "Q S"], b: Float[Tensor, "Q E"], ridges: Sequence[float]
) -> Iterator[Float[Tensor, "S E"]]:
    """The x with |a x - b|^2 + ridge t |x|^2 least, for each ridge; 0 where that fails.

    By way of the smaller of the two Gram matrices, which gives the same.
    """
    few = a.shape[1] <= a.shape[0]
    gram, right = (a.mT @ a, a.mT @ b) if few else (a @ a.mT, b)
    unit = gram.diagonal().sum() / a.shape[1]
    for ridge in ridges:
        lifted = gram.clone()
        lifted.diagonal().add_((ridge * unit).clamp(min=1e-12))
        factor, failed = torch.linalg.cholesky_ex(lifted)
        found = torch.cholesky_solve(right, factor)
        yield (found if few else a.mT @ found).masked_fill(failed != 0, 0)


def _weight(shares: Float[Tensor, "Q S"], fitted: int) -> Float[Tensor, " S"]:
    """Weights under which the entries have the full cache's mass.

    From the first `fitted` queries; 1 where those that are held out say that this is better.
    """
    weight, own = _nonnegative(shares[:fitted], _PULL), shares[fitted:]
    better = _error(1 - own @ weight) < _error(1 - own.sum(dim=-1))
    return torch.where(better, weight, 1).clamp(min=_LEAST)


def _nonnegative(shares: Float[Tensor, "Q S"], ridge: float) -> Float[Tensor, " S"]:
    """The w >= 0 with |shares w - 1|^2 + ridge t |w - 1|^2 least, by projected gradients (FISTA).

    They begin at 1, in units of each column's length, so that rare and heavy entries move alike;
    t is the mean squared length.
    """
    squares = shares.square().sum(dim=0)
    pull = (ridge * squares.mean()).clamp(min=1e-12)
    size = (squares + pull).sqrt()
    pull, step = pull / size.square(), 1 / (_largest(shares, size) + 1)
    start = weight = ahead = size
    momentum = 1.0
    for _ in range(_STEPS):
        slope = shares.mT @ (shares @ (ahead / size) - 1) / size + pull * (ahead - start)
        moved = (ahead - step * slope).clamp(min=0)
        later = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / later * (moved - weight)
        weight, momentum = moved, later
    return weight / size


def _largest(shares: Float[Tensor, "Q S"], size: Float[Tensor, " S"]) -> Float[Tensor, ""]:
    """A bound on the largest eigenvalue of the Gram matrix of columns in units of `size`.

    By power iteration, which is quick since nothing is negative, and a margin.
    """
    vector = torch.ones_like(size)
    found = vector[0]
    for _ in range(3):
        vector = shares.mT @ (shares @ (vector / size)) / size
        found = vector.norm().clamp(min=1e-30)
        vector = vector / found
    return 1.5 * found
