"""Result folders with made-up figures, in the form that `kvtrim eval` and `speed` write.

python tests/report/synthetic.py FOLDER    # a folder to look at reports with
"""

import json
import random
import sys
from math import exp
from pathlib import Path

LONGBENCH = (
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news "
    "trec triviaqa samsum passage_count passage_retrieval_en lcc repobench-p"
).split()
RULER = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 "
    "niah_multivalue niah_multiquery vt cwe fwe"
).split()
METHODS = (
    "random streaming-llm knorm snapkv h2o tova pyramidkv adakv headkv chunkkv criticalkv laprox "
    "kvzip lava cake curdkv ada-curdkv keydiff circuitkv shotkv fastkv gemfilter"
).split()
FULL_BYTES, FULL_ENTRIES = 90_000_000, 2000.0


def evaluation(
    folder,
    tasks,
    methods,
    keeps=("128", "256", "512", "1024"),
    model="smollm2",
    protocol="question-agnostic",
    length=2048,
    limit=12,
    seed=0,
    settings=None,
):
    """An eval folder. `tasks` are names, or (name, [group, ...]) with one sample per group."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    wanted = [("full", ""), *((m, k) for m in methods for k in keeps)]
    record = {
        "kind": "eval",
        "model": {"name": model, "dtype": "float32"},
        "tasks": {},
        "methods": [{"method": m, "keep": k, "settings": settings or {}} for m, k in wanted],
        "protocol": protocol,
        "limit": limit,
        "length": length,
        "seed": seed,
        "batch": 1,
        "decoding": "greedy",
        "machine": {"kvtrim": "0", "commit": "0" * 40, "device": "cpu", "packages": {}},
    }
    inputs, samples, scores = [], [], []
    for task in tasks:
        name, groups = (task, [{}] * limit) if isinstance(task, str) else task
        data = {name: {"file": f"{name}.jsonl", "rows": 200, "sha256": "ab" * 32}}
        about = {"version": 1, "metric": "F1", "max_new_tokens": 32, "data": data}
        record["tasks"][name] = about
        for number, group in enumerate(groups):
            inputs.append({"task": name, "sample": f"{number}", "group": group})
            best, hard = draw.random() ** 0.4, draw.random()
            for method, keep in wanted:
                line = _sample(name, number, method, keep, protocol, methods, hard)
                samples.append(line)
                score = best * max(0.0, 1 - line["kl"] * hard) if line["kl"] else best
                score = float(round(score)) if name.startswith("ruler") else round(score, 4)
                own = {k: line[k] for k in ("task", "sample", "method", "keep", "protocol")}
                scores.append(own | {"score": score, "metric": "F1"})
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    for file, rows in (("inputs", inputs), ("samples", samples), ("scores", scores)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(text)
    return folder


def _sample(name, number, method, keep, protocol, methods, hard):
    line = {"task": name, "sample": f"{number}", "method": method, "keep": keep}
    line |= {"protocol": protocol, "answer": "", "new_tokens": 8, "stopped": "eos"}
    line |= {"full_bytes": FULL_BYTES, "prompt_tokens": 2000, "outcome": "ok", "reason": ""}
    if method == "full":
        figures = {"held_bytes": FULL_BYTES, "entries": FULL_ENTRIES, "loss": 0.5 + hard}
        return line | figures | {"kl": None}
    asked = float(keep.rstrip("%"))
    share = asked / 100 if keep.endswith("%") else min(1.0, asked / FULL_ENTRIES)
    kl = (0.2 + 0.1 * methods.index(method)) * exp(-4 * share) * (0.5 + hard)
    figures = {"held_bytes": int(share * FULL_BYTES) + 1000, "entries": share * FULL_ENTRIES}
    return line | figures | {"loss": 0.5 + hard + kl / 2, "kl": kl}


def speed(folder, methods=("snapkv", "h2o"), lengths=(1024, 4096), keep="256"):
    """A speed folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("layers_flop_per_token", "head_flop_per_token", "attention_flop_per_pair")
    limits = dict.fromkeys((*names, "weight_bytes"), 1e6)
    record = {
        "model": {"name": "smollm2", "config": None, "dtype": "float32"},
        "plan": {"repeats": 2, "new_tokens": 4},
        "machine": {"device": "an abacus", "threads": 2},
        "limits": limits | {"copy_bytes_per_s": 1e10, "matmul_flop_per_s": 1e12},
    }
    lines = []
    for length in lengths:
        for place, method in enumerate(("transformers", *methods)):
            own = {"batch": 1, "length": length, "method": method}
            own |= {"keep": keep if place else "", "outcome": "ok"}
            entries = float(keep) if place else float(length)
            held = {"held_bytes": int(entries * 45_000), "full_bytes": length * 45_000}
            peaks = {"peak_bytes": length * 60_000, "decode_peak_bytes": held["held_bytes"]}
            lines.append(own | {"round": 0} | peaks)
            for number in (1, 2):
                ttft, token = length / 2000 * (1 + place / 20), 0.02 + entries / 1e6
                times = {"ttft_s": ttft, "token_s": token * number, "median_step_s": token}
                times |= {"end_to_end_s": ttft + 4 * token, "entries": entries}
                lines.append(own | {"round": number} | times | held)
    (folder / "run.json").write_text(json.dumps(record) + "\n")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "speed.jsonl").write_text(text)
    return folder


def largest(folder, lengths=(1024,), most=(("snapkv", 3),)):
    """A folder of `speed --batch max`; `most` are methods with their largest batch, at most 3."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "model": {"name": "smollm2", "config": None, "dtype": "float32"},
        "plan": {"lengths": lengths, "memory": 2**30, "new_tokens": 4, "most": 4096},
        "machine": {"device": "an abacus", "threads": 2},
        "limits": {"copy_bytes_per_s": 1e10},
    }
    lines = []
    for length in lengths:
        for method, best in (("transformers", 1), *most):
            own = {"length": length, "method": method}
            own |= {"keep": "" if method == "transformers" else "256"}
            for batch in (1, 2, 4, 3)[: best + 1]:
                found = {"fits": batch <= best, "used_bytes": batch * 10**6, "held_bytes": 10**5}
                found |= {"token_s": 0.5, "tokens_per_s": 2.0 * batch, "captured": False}
                lines.append(own | {"batch": batch} | found)
            lines.append(own | {"batch": 5, "fits": False, "reason": "out of memory"})
    (folder / "run.json").write_text(json.dumps(record) + "\n")
    (folder / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def grid(lengths=(1024, 2048, 3072, 4096), depths=(0, 25, 50, 75, 100), times=2):
    """Groups of a needle task."""
    cells = [{"length": n, "depth": d} for n in lengths for d in depths]
    return [cell for cell in cells for _ in range(times)]


def longbench(task):
    """The name that `kvtrim eval` gives a LongBench task."""
    return f"longbench-{task.replace('_', '-')}"


def ruler(task):
    """The name that `kvtrim eval` gives a RULER task."""
    return f"ruler-{task.replace('_', '-')}"


def everything(folder):
    """All benchmarks, many methods, both protocols."""
    tasks = [*map(longbench, LONGBENCH[:9]), *map(ruler, RULER), ("niah", grid((2048,)))]
    tasks += [f"gsm8k-{n}" for n in (0, 1, 2, 4, 8)]
    tasks += ["mmlu-5", "csqa-4", "humaneval", "longgenbench"]
    evaluation(folder / "agnostic", tasks, METHODS)
    for length in (1024, 3072, 4096):
        own = [("niah", grid((length,)))]
        evaluation(folder / f"niah-{length}", own, METHODS, length=length, seed=length)
    speed(folder / "speed", METHODS[3:8])
    few = METHODS[1:6]
    ruler_tasks = [*map(ruler, RULER)]
    evaluation(folder / "aware", ruler_tasks, few, protocol="question-aware", seed=1)
    llama = "meta-llama/Llama-3.1-8B-Instruct"
    keeps = ["128", "512", "1024"]
    evaluation(
        folder / "llama",
        [*map(longbench, LONGBENCH)],
        few,
        keeps,
        llama,
        "question-aware",
        8192,
        seed=2,
    )


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
