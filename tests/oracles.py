"""Formulas and models as plain, slow, obvious code. Nothing here shares code with kvtrim."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

_PLAN = {}


def masked_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    """Eager attention under an explicit mask per layer and query head, set by `run_masked`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = _PLAN["masks"][module.layer_idx]
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return (weights.nan_to_num() @ value).transpose(1, 2).contiguous(), None


def run_masked(model, ids, masks):
    """Logits [B, n, vocabulary] of an untouched model whose layers attend under `masks[layer]`.

    A mask is bool, broadcast to [B, H, n, n], True = attend.
    """
    AttentionInterface.register("oracle", masked_attention)
    AttentionMaskInterface.register("oracle", lambda **_: None)
    before = model.config._attn_implementation
    _PLAN["masks"] = masks
    model.set_attn_implementation("oracle")
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


def causal(n, window=None):
    """[n, n]: each token sees itself and what came before, at most `window` tokens in all."""
    row, column = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = column <= row
    return seen if window is None else seen & (column > row - window)


def window_weights(q, k, window, scale):
    """Softmax of the last `window` queries over all keys, one query at a time: [H, W, n]."""
    q, k = q.double(), k.double()
    heads, n, _ = q.shape
    groups = heads // k.shape[0]
    out = torch.zeros(heads, window, n, dtype=torch.float64)
    for h in range(heads):
        for i in range(window):
            at = n - window + i
            logits = k[h // groups, : at + 1] @ q[h, at] * scale
            out[h, i, : at + 1] = logits.softmax(0)
    return out


def column_sums(q, k, scale):
    """Attention each key receives from all queries: [H, n]."""
    return window_weights(q, k, q.shape[1], scale).sum(1)


def top(scores, count):
    """Indices of the largest scores, ties to the lower index, ascending."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:count])
