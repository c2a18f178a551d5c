"""Prompts of 1 to 3 tokens under every method and preset: read, or refused in plain words."""

import torch

import kvtrim
import models
from kvtrim.errors import KvtrimError
from small import small

FORMS = [(name, None) for name in sorted(kvtrim.METHODS)]
FORMS += [(name, preset) for name, _ in FORMS for preset in kvtrim.METHODS[name].presets]


def caches(model, name, preset, prompt):
    """One for each kind of budget that takes the method; none keeps less than a token.

    Every method meets both, and its presets by turns: what a preset changes and how a budget was
    written meet nowhere but in the number of entries.
    """
    place = FORMS.index((name, preset))
    for keep in (0.1, "1KiB") if preset is None else ((0.1, "1KiB")[place % 2],):
        own = small(name) | ({} if preset is None else {"preset": preset})
        try:
            yield kvtrim.Cache(model, name, keep, prompt_tokens=prompt, **own)
        except KvtrimError:
            continue


def test_prompts_of_a_few_tokens_are_read_and_continued(llama):
    model, read = llama, set()
    for name, preset in FORMS:
        for length in (1, 2, 3) if preset is None else (2,):
            for cache in caches(model, name, preset, length):
                with torch.no_grad(), kvtrim.attach(model):
                    try:
                        out = model(models.prompt(length), past_key_values=cache).logits
                    except KvtrimError:
                        continue
                    assert bool(out.isfinite().all()), (name, preset, length)
                    after = model(models.prompt(1), past_key_values=cache).logits
                    assert bool(after.isfinite().all()), (name, preset, length)
                read.add(name)
    assert read == {*kvtrim.METHODS}


def test_a_prompt_of_two_tokens_beside_a_long_one(llama):
    ids, mask = models.prompt(40, rows=2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :38] = 0
    for name, preset in FORMS:
        own = small(name) | ({} if preset is None else {"preset": preset})
        try:
            cache = kvtrim.Cache(llama, name, 0.25, prompt_tokens=40, **own)
            with torch.no_grad(), kvtrim.attach(llama):
                llama(ids, attention_mask=mask, past_key_values=cache)
        except KvtrimError:
            continue
        held = models.positions(cache, 1)
        assert all(set(head) <= {0, 1} for layer in held for head in layer), (name, preset)
