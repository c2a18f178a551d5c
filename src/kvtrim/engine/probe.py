"""A probe: text read after the prompt and forgotten again, to see what it attends to.

KVzip probes a prompt with the order to repeat it, chunk by chunk. Whatever the probe is, a policy
with `probes` observes each pass of it and scores what it saw once the last pass is over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtrim.prompts import Words
from kvtrim.types import Probed

REMEMBERED = 8
"""Tokens of the chunk before that tell the model where to go on."""


@dataclass(frozen=True)
class Step:
    """One pass of a probe over one prompt."""

    ids: list[int]
    probed: Probed


def repetition(ids: Sequence[int], words: Words, chunk: int) -> list[Step]:
    """The passes that make a model repeat a prompt.

    Source: KVzip, https://arxiv.org/abs/2505.23416; NVIDIA/kvpress@8bb29b9, kvzip_press.py.
    """
    steps, given = [], list(ids[: len(words.prefix)]) == words.prefix
    prefix = len(words.prefix) if given else 0
    for start in range(prefix, len(ids), chunk):
        part = list(ids[start : start + chunk])
        if start == prefix:
            request = words.first
        else:
            request = [*words.later, *ids[start - REMEMBERED : start]]
        probed = Probed(start, start + len(part))
        steps.append(Step([*request, *words.suffix, *part], probed))
    return steps
