"""CircuitKV: tokens that random walks visit often stay, whether from the last token or anywhere.

The attention of the last W queries, its maximum over heads, makes a token graph. A slot ranks by
its visits from the newest token and from everywhere; the better rank counts, one set for all
heads. Costs W attention rows and O(steps * n * W). Leans to early slots.

Paper: none; `v4.3` is the code behind the published rows.
Code:  Js-Hwang1/submission_folder@40956ab and @86bf1a1 (head-*), pyramidkv/pyramidkv_utils.py.
Ours:  the same series without n x n matrices, fp64; ties rank by slot; KV heads are stored; heads
       of different length walk apart; surface="own" averages the queries of a KV head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Positive, Range, Some, Tokens
from kvtrim.types import Float, Int, LayerView, Scores, Tensor


@dataclass(frozen=True)
class CircuitKV(Policy):
    window: Some = 8  # how many last queries draw the graph; their slots always stay
    surface: Literal["max", "split", "own"] = "max"  # over heads; "own": each head, no walk
    clearest: Some = 10  # with "split", so many low-entropy heads draw the newest token's graph
    steps: Annotated[int, Range(1, 1000)] = 10  # of the walk
    temperature: Positive = 1.0  # of the graph: below 1 it is sharper
    sinks: Tokens = 4

    def lookback(self) -> int:
        return self.window

    def recent(self, keep: int) -> int:
        return self.window

    def score(self, layer: LayerView) -> Scores:
        """Better of two ranks: queries [B, H, W, D], keys [B, K, S, D] to scores [B, K, S]."""
        heads, lengths = layer.keys.shape[1], ops.lengths(layer)
        weights = ops.attention(layer, last=self.window)
        if self.surface == "own":
            every = lengths.repeat_interleave(weights.shape[1] // heads, dim=1)
            return ops.reduce_group(alone(weights, every, self.sinks), heads, "mean")
        if layer.lengths is None:
            return self._walk(weights, lengths, 1)
        alike = (layer.lengths == layer.lengths[:, :1]).all(dim=1).tolist()
        parts = zip(weights.split(1), lengths.split(1), alike, strict=True)
        return torch.cat([self._walk(w, held, 1 if one else heads) for w, held, one in parts])

    def _walk(
        self, weights: Float[Tensor, "B H W S"], lengths: Int[Tensor, "B K"], walks: int
    ) -> Scores:
        """Scores from one walk for all heads, or one for each."""
        heads = lengths.shape[1]
        weights, held = weights.unflatten(1, (walks, -1)), lengths[:, :walks].flatten()
        best = ranks(self.visits(weights.flatten(0, 1), held), held).amax(dim=1)
        return best.unflatten(0, (-1, walks)).expand(-1, heads, -1)

    def visits(
        self, weights: Float[Tensor, "C H W S"], lengths: Int[Tensor, " C"]
    ) -> Float[Tensor, "C 2 S"]:
        """Expected visits from the newest token and from anywhere."""
        walk = (lengths, self.sinks, self.steps, self.temperature)
        if self.surface == "max":
            return visits(weights.amax(dim=1), *walk)
        return apart(weights, self.clearest, *walk)


# Random walks from token to token along the attention of a prompt's last queries.
#
# A chain has one state per slot: the first `sinks` absorb, the last W slots (the window) step to
# what their query attends to, and every other slot steps to an earlier one in proportion to the
# attention that the window pays to it. That middle part has rank one, so a step of the walk costs
# S * W and the S x S matrix never exists.
#
# C chains, S slots of which the first `lengths[c]` are real; attention to others must be 0.

_LEAST_PULL = 1e-6  # a slot that the window ignores can still be stepped to
_LEAST_WEIGHT = 1e-8  # below this a weight counts as this in an entropy
_SINK_SHARE = 0.01  # of all visits, shown for the sinks, which the walk does not count


def visits(
    surface: Float[Tensor, "C W S"],
    lengths: Int[Tensor, " C"],
    sinks: int,
    steps: int,
    temperature: float = 1.0,
) -> Float[Tensor, "C 2 S"]:
    """Expected visits in `steps` steps, float64: from the newest slot, and from anywhere alike."""
    total = surface.new_zeros((), dtype=torch.float64)
    for now in arrivals(surface, lengths, sinks, steps, temperature):
        total = total + now
    total[..., :sinks] = 0
    total[..., :sinks] = _SINK_SHARE * total.sum(dim=-1, keepdim=True)
    return total


def arrivals(
    surface: Float[Tensor, "C W S"],
    lengths: Int[Tensor, " C"],
    sinks: int,
    steps: int,
    temperature: float = 1.0,
) -> Iterator[Float[Tensor, "C 2 S"]]:
    """Where walks start and where each step brings them: from the newest slot, from anywhere.

    What reaches a sink stays there and is in no later step.
    """
    surface, window = surface.double(), surface.shape[1]
    slot, first = torch.arange(surface.shape[-1], device=surface.device), lengths - window
    walked = (slot >= sinks) & (slot < lengths[:, None])
    prefix = slot < first[:, None]
    pull = surface.sum(dim=1).clamp(min=_LEAST_PULL).masked_fill(~prefix, 0)
    if temperature != 1:
        surface, pull = surface ** (1 / temperature), pull ** (1 / temperature)
    steer = surface / surface.sum(dim=-1, keepdim=True)
    reach = _before(pull)
    chance = torch.where(prefix & walked & (reach > 0), 1 / reach, 0)[:, None]  # 1 / row sum
    rows = (first[:, None] + torch.arange(window, device=slot.device))[:, None].expand(-1, 2, -1)
    newest = (slot == lengths[:, None] - 1).double()
    anywhere = walked.double() / walked.sum(dim=-1, keepdim=True).clamp(min=1)
    now = torch.stack([newest, anywhere], dim=1)
    yield now
    for _ in range(steps):
        now = now * walked[:, None]
        stepped = pull[:, None] * _before((now * chance).flip(-1)).flip(-1)
        now = stepped + now.gather(-1, rows) @ steer
        yield now


def _before(values: Float[Tensor, "*C S"]) -> Float[Tensor, "*C S"]:
    """The sum of everything before each slot."""
    return F.pad(values.cumsum(dim=-1)[..., :-1], (1, 0))


def apart(
    weights: Float[Tensor, "C H W S"],
    heads: int,
    lengths: Int[Tensor, " C"],
    sinks: int,
    steps: int,
    temperature: float = 1.0,
) -> Float[Tensor, "C 2 S"]:
    """Visits on two graphs, each smoothed over its neighbours.

    From the newest slot on the graph of the `heads` clearest heads; from anywhere on the graph of
    the heads that look past the sinks.
    """
    near = visits(clearest(weights, heads), lengths, sinks, steps, temperature)[:, 0]
    hubs = visits(outward(weights, sinks), lengths, sinks, steps, temperature)[:, 1]
    return torch.stack([smooth(near, 3, 0.5), smooth(hubs, 5, 1.0)], dim=1)


def clearest(weights: Float[Tensor, "C H W S"], count: int) -> Float[Tensor, "C W S"]:
    """The largest weight over the `count` heads whose attention has the lowest entropy."""
    order = _entropies(weights).mean(dim=-1).argsort(dim=-1, stable=True)[:, :count]
    chosen = order[..., None, None].expand(-1, -1, *weights.shape[2:])
    return weights.gather(1, chosen).amax(dim=1)


def outward(weights: Float[Tensor, "C H W S"], sinks: int) -> Float[Tensor, "C W S"]:
    """The mean weight over the heads whose attention goes outward; over all heads if none does.

    Outward: half of it or more is paid to other slots than the sinks.
    """
    outside = weights[..., sinks:].sum(dim=-1).mean(dim=-1) >= 0.5  # [C, H]
    outside |= ~outside.any(dim=-1, keepdim=True)
    share = outside / outside.sum(dim=-1, keepdim=True)
    return torch.einsum("chwn,ch->cwn", weights, share)


def alone(
    weights: Float[Tensor, "B H W S"], lengths: Int[Tensor, "B H"], sinks: int
) -> Float[Tensor, "B H S"]:
    """Each head by itself, without a walk: a blend of two ranks.

    One ranks by what its newest query sees in one or two hops, the other by what it sees, early
    slots raised. The sharper the head, the more the former counts.
    """
    window, newest = weights.shape[2], weights[:, :, -1]
    slot = torch.arange(weights.shape[-1], device=weights.device)
    first = lengths[..., None] - window
    rows = first + torch.arange(window, device=slot.device)
    hops = newest.gather(-1, rows.clamp(min=0)).masked_fill(rows < 0, 0)  # a slot that is gone
    twice = (hops[:, :, None] @ weights)[:, :, 0]
    walked = lengths[..., None] - sinks
    early = 1 + (walked - (slot - sinks)) / walked
    both = smooth(torch.stack([newest + twice, newest * early], dim=2), kernel=5, sigma=1.0)
    placed = ranks(both, first[..., 0])
    entropy = _entropies(newest)[..., None]  # [B, H, 1]
    low, high = entropy.aminmax(dim=1, keepdim=True)
    blur = (entropy - low) / (high - low).clamp(min=torch.finfo(entropy.dtype).tiny)
    return (1 - blur) * placed[:, :, 0] + blur * placed[:, :, 1]


def smooth(values: Float[Tensor, "*C S"], kernel: int, sigma: float) -> Float[Tensor, "*C S"]:
    """Gaussian mean over `kernel` neighbours, zeros beyond the ends."""
    steps = torch.arange(kernel, device=values.device).to(values.dtype) - kernel // 2
    bell = torch.exp(-0.5 * (steps / sigma) ** 2)
    flat = values.reshape(-1, 1, values.shape[-1])
    return F.conv1d(flat, (bell / bell.sum())[None, None], padding=kernel // 2).view_as(values)


def ranks(values: Float[Tensor, "*C 2 S"], counts: Int[Tensor, "*C"]) -> Float[Tensor, "*C 2 S"]:
    """Place of the first `counts` values in ascending order, 0 to 1; above 1 for the others.

    Equal values keep their slot order.
    """
    slot = torch.arange(values.shape[-1], device=values.device)
    others = slot >= counts[..., None, None]
    order = values.masked_fill(others, torch.inf).argsort(dim=-1, stable=True)
    places = torch.empty_like(order).scatter_(-1, order, slot.expand_as(order))
    return places / (counts - 1).clamp(min=1)[..., None, None]


def _entropies(weights: Float[Tensor, "*C S"]) -> Float[Tensor, "*C"]:
    """Entropy of each row of attention, in nats."""
    return torch.special.entr(weights.clamp(min=_LEAST_WEIGHT)).sum(dim=-1)
