"""Every analysis by its name."""

from collections.abc import Mapping

from kvtrim.bench.analyses import (
    circuitkv,
    curdkv,
    fastkv,
    folders,
    kvfundabench,
    laprox,
    propagation,
)
from kvtrim.bench.analyses.base import Analysis
from kvtrim.errors import UnknownNameError

_FAMILIES = (fastkv, propagation, curdkv, kvfundabench, laprox, circuitkv, folders)
ANALYSES: Mapping[str, Analysis] = {
    one.name: one for family in _FAMILIES for one in family.ANALYSES
}


def find(name: str) -> Analysis:
    """The analysis of that name. Raises UnknownNameError, which names the nearest."""
    if name not in ANALYSES:
        raise UnknownNameError("analysis", name, ANALYSES)
    return ANALYSES[name]
