"""Prompts of given token ids for analyses of tiny models, and plain loops over what they see."""

import torch

import kvtrim
import models
import oracles
from kvtrim.bench.analyses.base import Asked, Subject
from kvtrim.bench.analyses.prompts import _text_task
from kvtrim.bench.eval.encode import Input
from kvtrim.prompts import frame
from kvtrim.prompts.document import Document
from kvtrim.tasks.base import Sample

WINDOW = 8


def asked(model, *lengths, question=0, **settings):
    """Random prompts of these lengths; the last `question` tokens come later if not aware."""
    subjects = [_subject(n, question, seed) for seed, n in enumerate(lengths)]
    given = {"window": WINDOW, **settings}
    return Asked("tiny", model, models.tokenizer(), subjects, **given)


def _subject(length, question, seed):
    ids, name = models.prompt(length, seed=seed)[0].tolist(), f"prompt-{seed}"
    sample, around = Sample(name, Document.of("text"), "", ()), frame(models.tokenizer(), False)
    cut = length - question
    return Subject(
        name, _text_task(name, None), Input(sample, ids[:cut], ids[cut:], {}, [], around)
    )


def ids_of(given, number=0):
    return torch.tensor([given.subjects[number].given.ids])


def calls_of(model, ids):
    """What each layer was handed: (queries [H, n, D], keys, values [K, n, D], scale)."""
    calls = {}
    cache = kvtrim.Cache(model, "full", tap=lambda index, call: calls.setdefault(index, call))
    with torch.no_grad(), kvtrim.attach(model):
        model(ids, past_key_values=cache)
    return [calls[index] for index in sorted(calls)]


def weights_of(call, window=None):
    """Attention of the last queries, one pair at a time: [H, W, n]."""
    q, k = call.queries[0], call.keys[0]
    return oracles.window_weights(q, k, q.shape[1] if window is None else window, call.scale)
