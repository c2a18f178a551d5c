"""Echo: foretell, as each token is read, how much a repetition of the text would look at it.

Rule:  per layer and KV head a linear map of the hidden state that the attention block receives to
       the log of KVzip's score, fitted once per model on the scores of its own probe
       (`kvtrim calibrate echo`). No token is needed but the one at hand, and no second pass.
Paper: Jegou and Jeblick 2026 (KVzap), https://arxiv.org/abs/2601.07891.
Code:  NVIDIA/kvpress@8bb29b9, kvzap/ and presses/kvzap_press.py (which masks, and frees nothing).
Ours:  one pool for the model in place of a threshold (`budget.threshold` gives that too); KVzip's
       scores as well as KVzip+'s as target; closed form; exp of the map, so that scores are
       attention again; a table belongs to exactly the weights it was fitted on.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F

from kvtrim.errors import UsageError
from kvtrim.methods import echo_tables
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Tokens
from kvtrim.types import Float, LayerView, Scores, Target, Tensor

AUTO = "auto"


@dataclass(frozen=True)
class Echo(Policy):
    table: str = AUTO  # a file, or the name of a shipped table; auto: one of this very model
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
                f"({', '.join(echo_tables.shipped_tables())}) were fitted on other weights. "
                f"Fit one: {echo_tables.HOW_TO} ({echo_tables.HOW_LONG}), then pass table=FILE "
                "(--set table=FILE)"
            )
        return replace(self, table=found).fitted(target)

    def lookback(self) -> int:
        return 0

    def foresee(self, index: int, hidden: Float[Tensor, "B Q M"]) -> Float[Tensor, "B K Q"]:
        """exp(hidden @ weight + bias) of a layer's KV heads, fp32."""
        if self.table == AUTO:
            raise UsageError(f"no table for echo was given. Fit one: {echo_tables.HOW_TO}")
        weight, bias = echo_tables.read(self.table).of(index, hidden.device)
        return F.linear(hidden.float(), weight, bias).exp().transpose(1, 2)

    def score(self, layer: LayerView) -> Scores:
        """What was foretold when each slot's token was read, [B, K, S]."""
        if layer.carried is None:
            raise TypeError("Echo scores what it foretold")
        return layer.carried
