"""How many entries each layer and head keeps."""

from kvtrim.budgets.base import Budget
from kvtrim.budgets.head_table import HeadTable
from kvtrim.budgets.keep import Keep
from kvtrim.budgets.layer_share import LayerShare
from kvtrim.budgets.model_wide import Global
from kvtrim.budgets.per_head import PerHead
from kvtrim.budgets.pyramid import Pyramid
from kvtrim.budgets.uniform import Uniform, Unlimited

BUDGETS: dict[str, type[Budget]] = {
    "global": Global,
    "layer-share": LayerShare,
    "head-table": HeadTable,
    "per-head": PerHead,
    "pyramid": Pyramid,
    "uniform": Uniform,
    "unlimited": Unlimited,
}

__all__ = [
    "BUDGETS",
    "Budget",
    "Global",
    "HeadTable",
    "Keep",
    "LayerShare",
    "PerHead",
    "Pyramid",
    "Uniform",
    "Unlimited",
]
