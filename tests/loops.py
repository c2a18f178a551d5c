"""Methods as plain loops over single numbers, and the golden files that were made of them.

    PYTHONPATH=src:tests python tests/loops.py

Nothing here shares code with kvtrim. Inputs are those of golden/inputs.safetensors; everything is
float64 and compared one number at a time, so this is slow. `golden/README.md` has the format.
"""

import json
import math

import torch
from safetensors.torch import save_file

import golden
import oracles


def inputs(name):
    """Queries, keys and values of one layer, float64."""
    return tuple(golden._tensors("inputs")[f"{name}/{x}"].double() for x in "qkv")


def projection(name):
    return golden._tensors("inputs")[f"wo/{name}"].double()


def share_before(ordered, room, mass):
    """How many of these shares, largest first, lie before the one with which `mass` is reached."""
    total, count = 0.0, 0
    for share in ordered:
        total += share
        if total >= mass or count == room:
            break
        count += 1
    return count


def head_columns(wo, head, width):
    """The output projection of one query head, [M, D]."""
    return wo[:, head * width : (head + 1) * width]


def defensive(q, k, v, wo, keep, window=32, kernel=5, mass=0.9, own="window", among="slots"):
    """DefensiveKV's scores of the slots before the window: [K][n - window]."""
    heads, n, width = q.shape
    kv_heads, group, candidates = len(k), heads // len(k), n - window
    weights = oracles.window_weights(q, k, window, width**-0.5).tolist()
    worst = [[0.0] * candidates for _ in range(kv_heads)]
    mean = [[0.0] * candidates for _ in range(kv_heads)]
    for head in range(heads):
        at = head // group
        for row in weights[head]:
            before, pooled = row[:candidates], []
            for j in range(candidates):
                near = range(max(0, j - kernel // 2), min(candidates, j + kernel // 2 + 1))
                pooled.append(sum(before[i] for i in near) / kernel)
            factor = sum(before) / sum(pooled)
            for j in range(candidates):
                worst[at][j] = max(worst[at][j], pooled[j] * factor)
                mean[at][j] += before[j] / (group * window)
    first, last = (0, candidates) if own == "window" else (candidates - window, candidates)
    paid = [sum(row[max(0, first) : last]) for each in weights for row in each]
    already = sum(paid) / len(paid)
    already = 1 - already if own == "window" else already
    sizes = [[0.0] * candidates for _ in range(kv_heads)]
    for head in range(heads):
        columns = head_columns(wo, head, width)
        for j in range(candidates):
            product = columns @ v[head // group, j]
            sizes[head // group][j] += float(product.abs().sum()) / group
    scores = []
    for at in range(kv_heads):
        floor = sum(worst[at]) / candidates
        row = []
        for j in range(candidates):
            whole = sum(sizes[at]) if among == "slots" else sum(each[j] for each in sizes)
            row.append(max(worst[at][j], floor) * sizes[at][j] / whole)
        scores.append(row)
    top = max(max(row) for row in scores)
    for at in range(kv_heads):
        order = sorted(range(candidates), key=lambda j: (-mean[at][j], j))
        shares = [mean[at][j] / sum(mean[at]) for j in order]
        for place in range(share_before(shares, keep - window, mass - already)):
            scores[at][order[place]] = top * (1 + shares[place])
    return scores


def turned(vector, by, theta=10000.0):
    """RoPE over all of a vector: pairs (i, i + D/2) turn by `by` times their frequency."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        angle = by * theta ** (-i / half)
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def expected_attention(q, k, v, future=512, covariance=True, value_norms=True, eps=0.0, sinks=4):
    """Expected attention of every slot, sinks 0: [K][n]."""
    heads, n, width = q.shape
    kv_heads, scale = len(k), width**-0.5
    group = heads // kv_heads
    columns = []  # the mean rotation, column by column
    for d in range(width):
        one, total = [float(i == d) for i in range(width)], [0.0] * width
        for at in range(n, n + future):
            for i, x in enumerate(turned(one, at)):
                total[i] += x / future
        columns.append(total)
    rotation = torch.tensor(columns, dtype=torch.float64).T
    scores = [[0.0] * n for _ in range(kv_heads)]
    for head in range(heads):
        at = head // group
        rows = [turned(q[head, i].tolist(), -i) for i in range(sinks, n)]
        mean = [sum(row[d] for row in rows) / len(rows) for d in range(width)]
        spread = torch.zeros(width, width, dtype=torch.float64)
        for row in rows:
            apart = torch.tensor([x - m for x, m in zip(row, mean, strict=True)]).double()
            spread += torch.outer(apart, apart) / len(rows)
        mean = rotation @ torch.tensor(mean, dtype=torch.float64)
        spread = rotation @ spread @ rotation.T
        weights = []
        for j in range(sinks, n):
            logit = float(mean @ k[at, j]) * scale
            if covariance:
                logit += float(k[at, j] @ spread @ k[at, j]) * scale**2 / 2
            weights.append(math.exp(logit))
        for j in range(sinks, n):
            scores[at][j] += weights[j - sinks] / sum(weights) / group
    for at in range(kv_heads):
        for j in range(sinks, n) if value_norms else ():
            scores[at][j] = (scores[at][j] + eps) * float((v[at, j] ** 2).sum()) ** 0.5
    return scores


def whole_heads(table, group, n, keep, sinks, window):
    """DuoAttention's positions [L][K]: table [L][H] of scores; a group's largest counts."""
    layers, kv_heads = len(table), len(table[0]) // group
    window = min(window, max(0, keep // 2 - sinks))
    entries = layers * kv_heads * keep - layers * kv_heads * (sinks + window)
    order = sorted(
        (-max(row[head * group : (head + 1) * group]), layer, head)
        for layer, row in enumerate(table)
        for head in range(kv_heads)
    )
    whole = set()
    while order and entries >= n - sinks - window:
        whole.add(order.pop(0)[1:])
        entries -= n - sinks - window
    others = layers * kv_heads - len(whole)
    newest = window + (entries // others if others else 0)
    kept = [[[*range(sinks), *range(n - newest, n)] for _ in range(kv_heads)] for _ in table]
    for layer, head in whole:
        kept[layer][head] = list(range(n))
    return kept


def probed(q, k, v, wo, weights, n, steps, sinks=4):
    """Largest weighed attention that the first n slots get from a probe, sinks 0: [K][n].

    What follows the n slots is the probe: `steps` are its passes as (tokens, start, stop), each of
    which is about the slots from start to stop; `weights[i]` is what token i of it counts.
    """
    heads, _, width = q.shape
    kv_heads, first = len(k), n
    scores = [[0.0] * n for _ in range(kv_heads)]
    for tokens, start, stop in steps:
        asked = range(max(sinks, start), stop)
        for head in range(heads):
            at, columns = head // (heads // kv_heads), head_columns(wo, head, width)
            sizes = {j: sum(float(x) ** 2 for x in columns @ v[at, j]) ** 0.5 for j in asked}
            for i in range(first, first + tokens):
                there = [*range(sinks), *asked, *range(first, i + 1)]
                powers = [math.exp(float(q[head, i] @ k[at, j]) * width**-0.5) for j in there]
                for j, power in zip(there, powers, strict=True):
                    if j in sizes:
                        found = power / sum(powers) * sizes[j] * weights[i - n]
                        scores[at][j] = max(scores[at][j], found)
        first += tokens
    return scores


# From scores to positions


def best(scores, count):
    """The `count` best of [layers][heads][slots], and the smallest relative gap at the cut."""
    listed = sorted(
        (-value, layer, head, slot)
        for layer, heads in enumerate(scores)
        for head, row in enumerate(heads)
        for slot, value in enumerate(row)
    )
    kept = [[[] for _ in heads] for heads in scores]
    for _, layer, head, slot in listed[:count]:
        kept[layer][head].append(slot)
    gap = math.inf
    if 0 < count < len(listed):
        last, next_ = -listed[count - 1][0], -listed[count][0]
        gap = (last - next_) / max(abs(last), 1e-300)
    return kept, gap


def among_heads(scores, room):
    """Each layer's best `room` per head on average, its heads together."""
    parts = [best([heads], room * len(heads)) for heads in scores]
    return [kept[0] for kept, _ in parts], min(gap for _, gap in parts)


def among_layers(scores, room):
    """The best of the whole model, `room` per head on average."""
    return best(scores, room * len(scores) * len(scores[0]))


def each_head(scores, room):
    """The best `room` of every head by itself."""
    parts = [[best([[row]], room) for row in heads] for heads in scores]
    kept = [[each[0][0][0] for each in heads] for heads in parts]
    return kept, min(each[1] for heads in parts for each in heads)


# Writing


class File:
    """A golden file under way."""

    def __init__(self, method):
        self.method, self.tensors, self.cases = method, {}, []

    def add(self, params, names, kept, scores, gap, notes, **others):
        """One case: `kept[layer][head]` positions, `scores[layer][head][slot]`."""
        assert gap > 1e-4, f"{self.method} {params}: cut at a gap of {gap:.1e}, too near to a tie"
        at = f"case{len(self.cases)}"
        for layer, heads in enumerate(kept):
            prefix = f"{at}/l{layer}/" if len(kept) > 1 else f"{at}/"
            for head, slots in enumerate(heads):
                self.tensors[f"{prefix}kept_head{head}"] = torch.tensor(sorted(slots))
            own = torch.tensor(scores[layer], dtype=torch.float64).float()
            self.tensors[f"{prefix}scores"] = own
        for name, tensor in others.items():
            self.tensors[f"{at}/{name}"] = tensor.contiguous()
        case = {"params": params, "inputs": list(names), "origin": "loops", "notes": notes}
        self.cases.append(case | {"min_gap": gap, "free": {}})

    def write(self):
        metadata = {"method": self.method, "cases": str(len(self.cases)), "format": "1"}
        metadata |= {f"case{i}": json.dumps(case) for i, case in enumerate(self.cases)}
        save_file(self.tensors, golden.FOLDER / f"{self.method}.safetensors", metadata)


def write_defensivekv():
    file = File("defensivekv")
    for budget, sets, keep, own, among in [
        ("per-head", ("s0_n200", "s1_n200"), 48, "window", "slots"),
        ("per-head", ("s2_n200", "s3_n200"), 80, "window", "slots"),
        ("per-head", ("s0_n333", "s1_n333"), 64, "before", "heads"),
        ("global", ("s0_n200", "s1_n200", "s2_n200"), 48, "window", "slots"),
        ("global", ("s1_n200", "s2_n200"), 70, "before", "heads"),
        ("global", ("s0_n333", "s1_n333"), 48, "window", "slots"),
    ]:
        wo = [f"h8_d32_l{layer}" for layer in range(len(sets))]
        scores = [
            defensive(*inputs(name), projection(w), keep, own=own, among=among)
            for name, w in zip(sets, wo, strict=True)
        ]
        share_out = among_heads if budget == "per-head" else among_layers
        kept, gap = share_out(scores, keep - 32)
        n = inputs(sets[0])[0].shape[1]
        kept = [[[*head, *range(n - 32, n)] for head in layer] for layer in kept]
        params = {"budget": budget, "keep": keep, "own": own, "among": among, "wo": wo}
        file.add(params, sets, kept, scores, gap, "keep includes the window of 32")
    file.write()


def write_expected_attention():
    file = File("expected_attention")
    for budget, sets, keep, settings in [
        ("uniform", ("s0_n200",), 48, {}),
        ("uniform", ("s1_n200",), 80, {"eps": 0.02}),
        ("uniform", ("s0_n333", "s1_n333"), 64, {"covariance": False}),
        ("uniform", ("s2_n200", "s3_n200"), 30, {"value_norms": False, "future": 64}),
        ("per-head", ("s2_n200", "s3_n200"), 60, {}),
    ]:
        scores = [expected_attention(*inputs(name), **settings) for name in sets]
        sinks = range(4)
        rest = [[row[len(sinks) :] for row in heads] for heads in scores]
        deal = each_head if budget == "uniform" else among_heads
        kept, gap = deal(rest, keep - len(sinks))
        kept = [[[*sinks, *(s + len(sinks) for s in row)] for row in heads] for heads in kept]
        params = {"budget": budget, "keep": keep, "settings": settings, "theta": 10000.0}
        file.add(params, sets, kept, scores, gap, "RoPE turns all of a head; queries are after it")
    file.write()


def add_probed(file, sets, n, keep, steps, budget, weights, notes, **others):
    """One case of a probe whose tokens count as `weights` [layers, tokens] says."""
    wo = [f"h8_d32_l{layer}" for layer in range(len(sets))]
    scores = [
        probed(*inputs(name), projection(w), own.tolist(), n, steps)
        for name, w, own in zip(sets, wo, weights, strict=True)
    ]
    rest = [[row[4:] for row in heads] for heads in scores]
    kept, gap = (among_layers if budget == "global" else among_heads)(rest, keep - 4)
    kept = [[[*range(4), *(s + 4 for s in row)] for row in heads] for heads in kept]
    params = {"budget": budget, "keep": keep, "prompt": n, "steps": steps, "wo": wo}
    file.add(params, sets, kept, scores, gap, notes, **others)


def write_kvzip_plus():
    file = File("kvzip_plus")
    draw = torch.Generator().manual_seed(7)
    for sets, n, keep, steps, budget in [
        (("s0_n200",), 160, 40, [(40, 0, 160)], "global"),
        (("s1_n200", "s2_n200"), 160, 50, [(24, 0, 80), (16, 80, 160)], "global"),
        (("s2_n200", "s3_n200"), 170, 30, [(12, 0, 64), (12, 64, 128), (6, 128, 170)], "global"),
        (("s3_n200", "s0_n200"), 180, 64, [(20, 8, 180)], "per-head"),
    ]:
        hidden = torch.rand(len(sets), 200 - n, 1, generator=draw) * 3 + 0.5  # tokens differ most
        hidden = hidden * torch.randn(len(sets), 200 - n, 48, generator=draw)
        weights = 1 / hidden.double().norm(dim=-1)
        notes = "tokens behind the prompt are the probe's; hidden: what each of them came with"
        add_probed(file, sets, n, keep, steps, budget, weights, notes, hidden=hidden)
    file.write()


def write_kvgrad():
    file = File("kvgrad")
    draw = torch.Generator().manual_seed(11)
    for sets, n, keep, steps, budget in [
        (("s0_n200",), 160, 40, [(40, 0, 160)], "global"),
        (("s1_n200", "s2_n200"), 160, 50, [(24, 0, 80), (16, 80, 160)], "global"),
        (("s3_n200", "s0_n200"), 170, 30, [(12, 0, 64), (12, 64, 128), (6, 128, 170)], "per-head"),
    ]:
        sensitivity = torch.rand(len(sets), 200 - n, generator=draw) ** 4 * 9  # a few matter most
        weights = sensitivity.double()
        notes = "tokens behind the prompt are the probe's; sensitivity: of each in every layer"
        add_probed(file, sets, n, keep, steps, budget, weights, notes, sensitivity=sensitivity)
    file.write()


def write_duoattention():
    file = File("duoattention")
    draw = torch.Generator().manual_seed(5)
    sets = ["s0_n200", "s1_n200", "s2_n200", "s3_n200"]
    for count, keep, sinks, window in [
        (4, 100, 4, 16),
        (4, 40, 4, 32),
        (4, 30, 0, 64),
        (4, 180, 8, 16),
        (2, 90, 4, 0),
    ]:
        table = torch.rand(count, 8, generator=draw, dtype=torch.float64)
        table = (table * 1000).round() / 1000
        kept = whole_heads(table.tolist(), 4, 200, keep, sinks, window)
        scores = [[[float(j) for j in range(200)]] * 2] * count  # a slot's position
        params = {"keep": keep, "sinks": sinks, "window": window}
        notes = "table: scores of the query heads; a KV head has its best one's"
        file.add(params, sets[:count], kept, scores, math.inf, notes, table=table)
    file.write()


if __name__ == "__main__":
    write_kvzip_plus()
    write_kvgrad()
    write_duoattention()
    write_defensivekv()
    write_expected_attention()
