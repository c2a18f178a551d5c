"""Every analysis by its name."""

from collections.abc import Mapping

from kvtrim.bench.analyses import (
    circuitkv,
    curdkv,
    fastkv,
    kvfundabench,
    laprox,
    propagation,
)
from kvtrim.bench.analyses.base import Analysis, OfFolders
from kvtrim.errors import UnknownNameError
from kvtrim.report.frontiers import frontier
from kvtrim.report.rank_tests import friedman
from kvtrim.report.sensitivity import sensitivity

_OF_FOLDERS = (
    OfFolders(
        "sensitivity",
        "KVFundaBench",
        "sensitivity of all tasks in one plot, mean over methods; instruct, base and distilled",
        "how much each task loses as the cache shrinks, and each model where there are several",
        compute=sensitivity,
    ),
    OfFolders(
        "friedman",
        "-",
        "critical-difference plot over tasks",
        "whether methods differ over tasks: Friedman's test and Nemenyi's critical difference",
        needs=("scipy",),
        compute=friedman,
    ),
    OfFolders(
        "frontier",
        "-",
        "quality against bytes held, time to first token and tokens per second",
        "which methods and budgets no other beats in both quality and cost",
        compute=frontier,
    ),
)
"""What evaluations and speed runs wrote is enough for these: no model is needed."""

_PAPERS = (fastkv, propagation, curdkv, kvfundabench, laprox, circuitkv)
ANALYSES: Mapping[str, Analysis] = {
    one.name: one for own in (*(paper.ANALYSES for paper in _PAPERS), _OF_FOLDERS) for one in own
}


def find(name: str) -> Analysis:
    """The analysis of that name. Raises UnknownNameError, which names the nearest."""
    if name not in ANALYSES:
        raise UnknownNameError("analysis", name, ANALYSES)
    return ANALYSES[name]
