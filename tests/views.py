"""One layer of one prompt as a policy sees it, for tests of policies."""

import torch

from kvtrim.types import LayerView


def view(q, k, v=None, **options):
    """From queries, keys and values [heads, n, D]; values are the keys unless given."""
    n = k.shape[1]
    given = {
        "index": 0,
        "layers": 1,
        "keep": 10,
        "tokens": n,
        "queries": q[None],
        "keys": k[None],
        "values": (k if v is None else v)[None],
        "positions": torch.arange(n).int().expand(1, k.shape[0], n),
        "scale": q.shape[-1] ** -0.5,
    }
    return LayerView(**{**given, **options})


def rope(vectors, by, theta=10000.0):
    """Vectors [N, D] turned on by so many positions each, as most models do."""
    half = vectors.shape[-1] // 2
    angles = by[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin, (a, b) = angles.cos(), angles.sin(), vectors.double().split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(vectors.dtype)
