"""KVzip: an entry matters as much as the model looks at it while repeating its own context.

Rule:  once the prompt is read, the model is asked to repeat it, chunk by chunk, against the full
       cache. A slot's score is the largest attention it gets from any query of its chunk's
       repetition, over the sinks, the chunk and the repetition itself. What a chat template puts
       before the context is not repeated: it scores 0, and but for the sinks goes first.
Paper: Kim et al. 2025, https://arxiv.org/abs/2505.23416.
Code:  NVIDIA/kvpress@8bb29b9, presses/kvzip_press.py; snu-mllab/KVzip.
       KVzip+ is the flag `kvzip_plus_normalization` there; called the best of that repository.
Ours:  what is evicted is freed per layer and head (kvpress masks it); scores are fp32; queries are
       taken in blocks. `kvtrim.Cache` needs a tokenizer for the words of the request.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtrim.methods.policies import ops, output
from kvtrim.methods.policies.base import Policy
from kvtrim.methods.ranges import Some, Tokens
from kvtrim.types import Float, LayerView, Noted, Probed, Scores, Tensor


@dataclass(frozen=True)
class KVzip(Policy):
    chunk: Some = 2048  # tokens repeated at a time
    sinks: Tokens = 4
    plus: bool = False  # KVzip+: attention times |value W_O|, over |hidden state| of the query
    probes: ClassVar[bool] = True

    @property
    def reads_hidden(self) -> bool:
        return self.plus

    def lookback(self) -> int:
        return 0  # `observe` has seen every query of the probe

    @property
    def weighs_values(self) -> bool:
        """Whether attention is multiplied by |value W_O|."""
        return self.plus

    def query_weights(self, layer: LayerView) -> Float[Tensor, "B Q"] | None:
        """What the attention of each query of the probe is multiplied by; None is 1."""
        return 1 / ops.length_of(ops.hidden(layer).float()) if self.plus else None

    def compared(self, layer: LayerView) -> Noted | None:
        """The sinks and the chunk that is repeated."""
        if layer.probed is None:
            return None
        sinks = min(self.sinks, layer.keys.shape[2] - layer.queries.shape[2])  # of a short prompt
        slots = torch.cat([torch.arange(sinks), torch.arange(*self._chunk(layer.probed))])
        return Noted(slots, self.query_weights(layer))

    def observe(self, layer: LayerView) -> Float[Tensor, "B K S"]:
        """Largest attention so far: probe queries [B, H, Q, D], keys [B, K, S, D] to [B, K, S]."""
        noted, probed = self.compared(layer), layer.probed
        if noted is None or probed is None or layer.carried is None:
            raise TypeError("KVzip observes a probe")
        (begin, stop), most = self._chunk(probed), ops.largest(layer, noted)
        if self.weighs_values:
            most = most * output.projected_norms(ops.narrow(layer, noted.slots))
        most = most[..., len(noted.slots) - (stop - begin) :]
        most = ops.reduce_group(most, layer.keys.shape[1], "max")
        found = layer.carried.clone()
        found[..., begin:stop] = found[..., begin:stop].maximum(most)
        return found

    def _chunk(self, probed: Probed) -> tuple[int, int]:
        """Where the chunk begins, sinks left out, and where it ends."""
        return min(max(probed.start, self.sinks), probed.stop), probed.stop

    def score(self, layer: LayerView) -> Scores:
        """What the probe saw, [B, K, S]."""
        if layer.carried is None:
            raise TypeError("KVzip scores what a probe observed")
        return layer.carried
