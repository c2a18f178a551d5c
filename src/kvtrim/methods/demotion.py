"""Structure demotion: scores of punctuation and blanks that repeat count less.

A repeated separator is easily foretold from the others like it, so that many scoring rules rate it
high; what it would hold of the budget goes to words and digits instead.

Source: NVIDIA/kvpress pull request 288, for KVzip's scores, which are never negative.
Ours:   for any scores. One below 0 is divided where another is multiplied, so that it falls too.
"""

from collections.abc import Sequence

import torch

from kvtrim.errors import UsageError
from kvtrim.methods.unit_numbers import unit_numbers
from kvtrim.prompts.spans import STRUCTURE
from kvtrim.types import LayerView, Scores, Spans

FACTOR = 0.25
"""What a score of structure is scaled by."""


def require_named(spans: Sequence[Spans]) -> None:
    """Refuse prompts that do not say what structure is in them; a part with no unit will do.

    Raises:
        UsageError: naming the part and how to give it.
    """
    if not spans or not all(STRUCTURE in named for named in spans):
        raise UsageError(
            f"demote=true needs to know where the prompt's {STRUCTURE} is: read it by "
            "kvtrim.generate, compress or the command line, with a fast tokenizer, or say so: "
            "kvtrim.Cache(..., "
            f"spans={{'{STRUCTURE}': [(start, end)]}}); or set demote=false"
        )


def demote(scores: Scores, view: LayerView) -> Scores:
    """Scores [B, K, N] of the first N slots of a view, those of structure lowered.

    Raises:
        UsageError: a prompt does not name the part.
    """
    require_named(view.spans)
    places = view.positions[..., : scores.shape[-1]]
    numbers = [
        unit_numbers(own, STRUCTURE, at) for own, at in zip(view.spans, places, strict=True)
    ]
    lower = torch.where(scores < 0, scores / FACTOR, scores * FACTOR)
    return torch.where(torch.stack(numbers) >= 0, lower, scores)
