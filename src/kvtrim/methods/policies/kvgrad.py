"""KVgrad: what an entry adds to the model's last hidden states while it repeats its context.

Rule:  KVzip's probe, in shorter parts. A slot's score is the largest, over the queries of its
       part's repetition and the query heads of its group, of attention times |value W_O| times
       the sensitivity of the query: the norm of the gradient, with respect to what the layer's
       attention adds to that query's token, of the sum of the squared norms of the last layer's
       outputs.
Paper: KVgrad, https://openreview.net/forum?id=cg1wTCJjjk.
Code:  NVIDIA/kvpress 0.5.5, presses/kvgrad_press.py.
Ours:  evicted for good, per layer and head. Gradients come from the model's own attention over a
       copy of the full cache, which a pass without gradients then observes.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvtrim.methods.policies.kvzip import KVzip
from kvtrim.methods.ranges import Some
from kvtrim.types import Float, LayerView, Tensor


@dataclass(frozen=True)
class KVgrad(KVzip):
    chunk: Some = 512  # tokens repeated at a time
    differentiates: ClassVar[bool] = True

    @property
    def weighs_values(self) -> bool:
        return True

    def query_weights(self, layer: LayerView) -> Float[Tensor, "B Q"] | None:
        """The sensitivity of each query of the probe."""
        if layer.sensitivity is None:
            raise TypeError("KVgrad needs the gradients of its probe")
        return layer.sensitivity.to(layer.queries.device)
