"""Echo: foretell, without reading it again, how much a repetition of the text would look at it.

Rule:  as each token is read, a linear map of the hidden state that the attention block receives,
       and of the lengths of the key and value made of it, to the log of KVzip's score per layer
       and KV head, fitted once per model on the scores of its own probe (`kvtrim calibrate echo`).
       No other token is needed for that, so it may be cut by in chunks and while generating. A
       cut at the end of a prompt knows more, and a second, small map corrects the first by it:
       how far from the end an entry stands, and what `asked` of the prompt's own queries, turned
       to a position behind it, look at. The largest weight that one of these gives an entry is
       added to what is foretold, and where the question is known so is that of the `window` last
       queries, the largest in a neighbourhood.
Paper: Jegou and Jeblick 2026 (KVzap), https://arxiv.org/abs/2601.07891.
Code:  NVIDIA/kvpress@8bb29b9, kvzap/ and presses/kvzap_press.py (which masks, and frees nothing).
Ours:  one pool for the model in place of a threshold (`budget.threshold` gives that too); KVzip's,
       KVzip+'s or KVgrad's scores as target; closed form; exp of the map, so that scores are
       attention again, and other attention can be added to them; a table belongs to exactly the
       weights it was fitted on; the second map.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from kvtrim.errors import UsageError
from kvtrim.methods import echo_tables
from kvtrim.methods.policies import ops
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Kernel, Tokens, Weight
from kvtrim.types import Float, LayerView, Scores, Target, Tensor

AUTO = "auto"
_REACHES = (16, 64, 256)  # tokens over which being near the end fades
_BEGINNING = 32  # and near the beginning
ENDS = len(_REACHES) + 1
"""Numbers that say how near an entry is to either end."""

_LEAST = 1e-4  # added to attention before its log
_FAINT = 1e-30
_NEWEST = 8  # of a window that votes: an answer begins behind them
_AT_ONCE = 64  # queries whose weights over all entries exist at once


@dataclass(frozen=True)
class Echo(Policy):
    table: str = AUTO  # a file, or the name of a shipped table; auto: one of this very model
    asked: Tokens = 96  # of the prompt's own queries per KV head, turned behind it, that say what
    # they look at; 0: none, for models whose queries cannot be turned
    looks: Weight = 3.0  # what the largest weight that one of these gives counts
    window: Tokens = 0  # so many last queries vote, too; 0: no question is known
    kernel: Kernel = 15  # width of the max-pooling of their votes, odd
    sinks: Tokens = 4
    local: Tokens = 128  # newest tokens that stay while generating, or half of the budget
    foresees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table != AUTO:
            echo_tables.read(self.table)

    @property
    def reads_hidden(self) -> bool:
        return True

    def fitted(self, target: Target) -> "Echo":
        if self.table != AUTO:
            echo_tables.require_shape(self.table, target)
            return self
        found = echo_tables.measured_on(target.identity())
        if found is None:
            raise UsageError(
                f"echo needs a table fitted on {target.name}; those that come with kvtrim "
                f"({', '.join(echo_tables.shipped_tables())}) were fitted on other weights. Fit "
                f"one: {echo_tables.HOW_TO} ({echo_tables.HOW_LONG}), then pass table=FILE "
                "(--set table=FILE)"
            )
        return replace(self, table=found).fitted(target)

    @cached_property
    def _maps(self) -> echo_tables.EchoTable:
        """The table, which is the same from the first layer to the last step."""
        if self.table == AUTO:
            raise UsageError(f"no table for echo was given. Fit one: {echo_tables.HOW_TO}")
        return echo_tables.read(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def lookback(self) -> int:
        return self.window

    def recent(self, keep: int) -> int:
        return min(self.window, _NEWEST)

    def foresee(
        self,
        index: int,
        hidden: Float[Tensor, "B Q M"],
        keys: Float[Tensor, "B K Q D"],
        values: Float[Tensor, "B K Q E"],
    ) -> Float[Tensor, "B N Q"]:
        """Exp of the first map, of a layer's KV heads, fp32."""
        first = self._maps.first(index, hidden.device)
        found = F.linear(hidden.float(), first.weight, first.bias)
        if first.lengths is not None:
            heads = first.weight.shape[0]
            found = found + F.linear(lengths(keys, values, heads), first.lengths)
        return found.exp().transpose(1, 2)

    def score(self, layer: LayerView) -> Scores:
        """What was foretold when each slot's token was read, and what queries at hand look at.

        [B, K, S].
        """
        scores = self._foretold(layer)
        return scores if not self.window else scores + self._votes(layer, scores.shape[-1])

    def _foretold(self, layer: LayerView) -> Float[Tensor, "B K S"]:
        """What was foretold, corrected at a prompt's end."""
        if layer.carried is None:
            raise TypeError("Echo scores what it foretold")
        if not layer.whole or self.table == AUTO:
            return layer.carried
        asked = layer.asked is not None
        second = self._maps.second(layer.index, asked, layer.carried.device)
        if second is None:
            return layer.carried
        heads = second.weight.shape[0]
        seen, most = seen_at_the_end(layer, heads)
        found = F.linear(seen, second.weight, second.bias).exp().transpose(1, 2)
        if most is not None:
            found = found + self.looks * most
        return found.repeat_interleave(layer.carried.shape[1] // heads, dim=1)

    def _votes(self, layer: LayerView, slots: int) -> Float[Tensor, "B K S"]:
        """The largest weight that a last query gives an entry or its neighbours."""
        count = min(self.window, layer.queries.shape[2], slots - 1)
        if count < 1:
            return layer.keys.new_zeros(layer.keys.shape[:3], dtype=torch.float32)
        weights = ops.window_attention(layer, count).amax(dim=2)
        most = ops.reduce_group(weights, layer.keys.shape[1], "max")
        return F.pad(ops.pool(most, self.kernel, "max"), (0, count))


def lengths(
    keys: Float[Tensor, "B K Q D"], values: Float[Tensor, "B K Q E"], heads: int
) -> Float[Tensor, "B Q F"]:
    """Lengths of the keys and values of `heads` KV heads, and the logs of them."""
    apart = keys.shape[1] // heads  # where query heads have entries of their own
    sizes = [ops.length_of(x[:, ::apart].float()).transpose(1, 2) for x in (keys, values)]
    both = torch.cat(sizes, dim=-1)
    return torch.cat([both, both.clamp(min=_FAINT).log()], dim=-1)


def seen_at_the_end(
    layer: LayerView, heads: int
) -> tuple[Float[Tensor, "B S F"], Float[Tensor, "B N S"] | None]:
    """What the second map reads of a complete prompt, of `heads` KV heads.

    The logs of what the first map said of every head, how near each entry stands to either end,
    and, if queries were asked, the largest and the mean weight that they give it. Beside these
    numbers the largest weights themselves.
    """
    if layer.carried is None:
        raise TypeError("Echo scores what it foretold")
    apart = layer.carried.shape[1] // heads
    at = layer.positions[:, 0].float()
    behind = layer.tokens - 1 - at
    near = [(-behind / reach).exp() for reach in _REACHES] + [(-at / _BEGINNING).exp()]
    found = [layer.carried[:, ::apart].clamp(min=_FAINT).log().transpose(1, 2)]
    found.append(torch.stack(near, dim=-1))
    most = None
    if layer.asked is not None:
        keys = layer.keys[:, ::apart]
        most, mean = looked_at(layer.asked, keys, layer.scale, layer.softcap)
        weights = torch.cat([most, mean * layer.tokens], dim=1)
        found.append((weights + _LEAST).log().transpose(1, 2))
    return torch.cat(found, dim=-1), most


def looked_at(
    asked: Float[Tensor, "B H r D"],
    keys: Float[Tensor, "B K S D"],
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "B K S"], Float[Tensor, "B K S"]]:
    """The largest and the mean weight that queries behind the prompt give every entry."""
    packed = asked.float().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    wide, count = keys.float().transpose(-1, -2), packed.shape[2]
    most, total = torch.zeros_like(wide[:, :, 0]), torch.zeros_like(wide[:, :, 0])
    for part in packed.split(_AT_ONCE, dim=2):
        logits = (part * scale) @ wide
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.softmax(dim=-1)
        most = most.maximum(weights.amax(dim=2))
        total = total + weights.sum(dim=2)
    return most, total / count
