"""Which hidden states go on to deeper layers while a prompt is read."""

from kvtrim.methods.propagation.base import Everything, Propagation
from kvtrim.methods.propagation.cascade import Cascade
from kvtrim.methods.propagation.restart import Restart
from kvtrim.methods.propagation.token_selective import TokenSelective

PROPAGATIONS: dict[str, type[Propagation]] = {
    "everything": Everything,
    "token-selective": TokenSelective,
    "cascade": Cascade,
    "restart": Restart,
}
"""Every propagation by name."""

__all__ = [
    "PROPAGATIONS",
    "Cascade",
    "Everything",
    "Propagation",
    "Restart",
    "TokenSelective",
]
