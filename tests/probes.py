"""Scores of a probe that weighs attention by values and queries, by plain loops."""

import torch

import kvtrim
from kvtrim.hf.probe import repetition
from kvtrim.hf.replay import record
from kvtrim.prompts import Words


def scores_by_hand(model, ids, chunk, sinks, weigh):
    """Of every context slot: [L, K, n], one query and one head at a time.

    `weigh(run)` says what each query of a pass counts, {layer: [tokens]}; `run()` reads the pass
    by the model and gives its tokens.
    """
    recording, steps = record(model, ids), repetition(ids[0].tolist(), Words(), chunk)
    layers, kv_heads = len(recording.calls), recording.calls[0].keys.shape[1]
    best = torch.zeros(layers, kv_heads, ids.shape[1], dtype=torch.float64)
    for step in steps:
        seen, cache, probe = {}, recording.full.copy(), torch.tensor([step.ids])
        cache.session._tap = seen.__setitem__

        def run(cache=cache, probe=probe):
            positions = ids.shape[1] + torch.arange(probe.shape[1])[None]
            with torch.no_grad(), kvtrim.attach(model):
                model(probe, position_ids=positions, past_key_values=cache)
            return probe

        counts = weigh(run)
        for layer, call in seen.items():
            heads, width = call.queries.shape[1], call.values.shape[-1]
            context, values = recording.calls[layer].keys[0], recording.calls[layer].values[0]
            projection = model.model.layers[layer].self_attn.o_proj.weight.detach()
            part = range(max(sinks, step.probed.start), step.probed.stop)
            for head in range(heads):
                group = head // (heads // kv_heads)
                own = projection[:, head * width : (head + 1) * width]
                looked_at = [context[group, j] for j in [*range(sinks), *part]]
                for i in range(len(step.ids)):
                    keys = torch.stack(looked_at + [call.keys[0, group, j] for j in range(i + 1)])
                    weights = (keys @ call.queries[0, head, i] * call.scale).softmax(dim=0)
                    for place, j in enumerate(part):
                        value = (own @ values[group, j]).norm()
                        found = weights[sinks + place] * value * counts[layer][i]
                        best[layer, group, j] = torch.maximum(best[layer, group, j], found)
    return best
