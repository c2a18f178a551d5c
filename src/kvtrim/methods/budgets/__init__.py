"""How many entries each layer and head keeps."""

from kvtrim import moved
from kvtrim.methods.budgets.base import Budget, Uniform, Unlimited
from kvtrim.methods.budgets.head_table import HeadTable
from kvtrim.methods.budgets.layer_share import LayerShare
from kvtrim.methods.budgets.model_wide import Global
from kvtrim.methods.budgets.per_head import PerHead
from kvtrim.methods.budgets.pyramid import Pyramid
from kvtrim.methods.budgets.whole_heads import WholeHeads

BUDGETS: dict[str, type[Budget]] = {
    "global": Global,
    "layer-share": LayerShare,
    "head-table": HeadTable,
    "per-head": PerHead,
    "pyramid": Pyramid,
    "uniform": Uniform,
    "unlimited": Unlimited,
    "whole-heads": WholeHeads,
}

__all__ = [
    "BUDGETS",
    "Budget",
    "Global",
    "HeadTable",
    "LayerShare",
    "PerHead",
    "Pyramid",
    "Uniform",
    "Unlimited",
    "WholeHeads",
]


def __getattr__(name: str) -> object:
    return moved.attribute(__name__, name)
