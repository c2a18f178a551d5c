"""Analyses of what evaluations and speed runs wrote: no model is needed."""

from kvtrim.bench.analyses.base import OfFolders
from kvtrim.report.frontiers import frontier
from kvtrim.report.rank_tests import friedman
from kvtrim.report.sensitivity import sensitivity

ANALYSES = (
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
