"""The other side of kvpress_pairs.py, run by a Python that has kvpress and no kvtrim.

    python kvpress_side.py FOLDER

Reads FOLDER/prompts.json and the model in FOLDER/model; writes one line per prompt, method and
share to FOLDER/kvpress.jsonl.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def press(method, ratio):
    """The press of a method that kvtrim has too."""
    snapkv = kvpress.SnapKVPress(ratio)
    made = {
        "snapkv": lambda: snapkv,
        "adakv": lambda: kvpress.AdaKVPress(snapkv),
        "criticalkv": lambda: kvpress.CriticalKVPress(snapkv),
        "pyramidkv": lambda: kvpress.PyramidKVPress(ratio),
        "expected-attention": lambda: kvpress.ExpectedAttentionPress(ratio),
        "knorm": lambda: kvpress.KnormPress(ratio),
        "keydiff": lambda: kvpress.KeyDiffPress(ratio),
        "tova": lambda: kvpress.TOVAPress(ratio),
        "streaming-llm": lambda: kvpress.StreamingLLMPress(ratio),
        "kvzip": lambda: kvpress.KVzipPress(ratio),
        "kvzip-plus": lambda: kvpress.KVzipPress(ratio, kvzip_plus_normalization=True),
    }
    return made[method]()


def main():
    """Every prompt, method and share."""
    folder = Path(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    given = json.loads((folder / "prompts.json").read_text())
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    with (folder / "kvpress.jsonl").open("w") as file:
        for number, prompt in enumerate(given["prompts"]):
            for method, share in given["cells"]:
                tokens = len(prompt["context"])  # equally many entries as kvtrim keeps
                exact = int(share * tokens) / tokens
                row = measured(model, prompt, method, exact) | {"prompt": number}
                row |= {"method": method, "share": share}
                file.write(json.dumps(row) + "\n")
                file.flush()
    packages = ("kvpress", "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    (folder / "kvpress.json").write_text(json.dumps(versions))


def measured(model, prompt, method, share):
    """Log-likelihood of each answer token; bytes of the cache; seconds to it."""
    cache, context = DynamicCache(), torch.tensor([prompt["context"]])
    ids = torch.tensor([prompt["question"] + prompt["answer"][:-1]])
    places = context.shape[1] + torch.arange(ids.shape[1])[None]
    start = time.perf_counter()
    with torch.no_grad():
        with press(method, 1 - share)(model):
            model.model(input_ids=context, past_key_values=cache)
        seconds = time.perf_counter() - start
        held = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
        logits = model(input_ids=ids, past_key_values=cache, position_ids=places).logits[0]
    gold = torch.tensor(prompt["answer"])
    right = logits[-len(gold) :].log_softmax(-1).gather(1, gold[:, None])[:, 0]
    return {"right": right.tolist(), "held_bytes": held, "seconds": seconds}


if __name__ == "__main__":
    main()
