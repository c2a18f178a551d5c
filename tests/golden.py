"""Reading the recorded figures of the reference implementations, see golden/README.md."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import safe_open

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    file: str
    number: int
    params: dict
    inputs: list

    @property
    def id(self):
        return f"{self.file}-{self.number}"

    def tensor(self, name):
        return _tensors(self.file)[f"case{self.number}/{name}"]

    def __contains__(self, name):
        return f"case{self.number}/{name}" in _tensors(self.file)

    def qkv(self):
        """Queries, keys and values: a list of layers each."""
        inputs = _tensors("inputs")
        sets = [name for name in self.inputs if f"{name}/q" in inputs]
        return tuple([inputs[f"{name}/{x}"] for name in sets] for x in "qkv")

    def differing_heads(self, kept, prefix=""):
        """Numbers of the heads whose kept positions differ, positions tied with the cut aside."""
        wrong = []
        for head, positions in enumerate(kept):
            name = "kept_shared" if f"{prefix}kept_shared" in self else f"kept_head{head}"
            free = name.replace("kept", "free")
            want = set(self.tensor(prefix + name).tolist())
            tied = set(self.tensor(prefix + free).tolist()) if prefix + free in self else set()
            got = positions.tolist()
            if len(got) != len(want) or not (set(got) ^ want) <= tied:
                wrong.append(head)
        return wrong


@cache
def _tensors(file):
    with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


@cache
def cases(file):
    """Every recorded case of a method."""
    with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
        metadata = opened.metadata()
    read = [json.loads(metadata[f"case{i}"]) for i in range(int(metadata["cases"]))]
    return [Case(file, i, case["params"], case["inputs"]) for i, case in enumerate(read)]
