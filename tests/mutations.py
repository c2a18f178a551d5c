"""Damaged files by the thousand: every one must be refused in one clear error, or be harmless.

python tests/mutations.py cache 2000 --seed 0     # saved caches, as they lie and signed again
python tests/mutations.py gguf 300 --seed 0       # headers of GGUF files
python tests/mutations.py weights 300 --seed 0    # safetensors and JSON of a model's folder

Prints each case that is wrong, and counts. A case is wrong if something else than an error of
kvtrim comes out of it, or if it is accepted and then gives other logits than the file it was made
from; with `gguf` and `weights` a changed value may be what somebody meant, and is only counted.
"""

import argparse
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import kvtrim
import models
from kvtrim.cache import archive
from kvtrim.errors import KvtrimError
from small import small

REFUSED, HARMLESS, OTHER, FOREIGN, ACCEPTED = "refused", "harmless", "other", "FOREIGN", "ACCEPTED"
WRONG = (FOREIGN, ACCEPTED)
ODD = [0, 1, -1, 2**31, 2**63, 10**30, 1e308, float("nan"), True, None, "", "x", "\ud800", [], {}]
ODD += [[0], ["x"], {"a": 1}, "evil:x", "../x", "full", 0.5, "9" * 400]


def bytes_changed(content: bytes, draw: random.Random, until: int) -> bytes:
    """Some bytes before a place changed, cut out, doubled or overwritten."""
    data, at = bytearray(content), draw.randrange(max(1, until))
    kind = draw.randrange(6)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(max(1, until))] = draw.randrange(256)
    elif kind == 2:
        del data[at : at + draw.randint(1, 16)]
    elif kind == 3:
        data[at:at] = data[at : at + draw.randint(1, 16)]
    elif kind == 4:
        wide = draw.choice([4, 8])
        number = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, draw.getrandbits(8 * wide)])
        data[at : at + wide] = (number % 2 ** (8 * wide)).to_bytes(wide, "little")
    else:
        del data[draw.randrange(len(data)) :]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested lists and objects."""
    if path:
        yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from places(value[key], (*path, key))


def json_changed(value: Any, draw: random.Random) -> Any:
    """One value of nested lists and objects changed, renamed or taken out."""
    value = copy.deepcopy(value)
    *above, last = draw.choice([*places(value)])
    owner = value
    for key in above:
        owner = owner[key]
    kind = draw.randrange(4)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner[f"{last}x"] = owner.pop(last)
    elif kind == 2 and isinstance(owner[last], int | float) and owner[last] < 2**62:
        owner[last] += draw.choice([-1, 1, 7, 0.5])
    else:
        owner[last] = draw.choice(ODD)
    return value


def tensors_changed(tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    """One tensor of another shape, type or content than the others expect."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}{draw.choice(['x', '.keys', '0'])}"] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensor[: max(0, len(tensor) - 1)].clone()
    elif kind == 3:
        tensors[name] = torch.cat([tensor, tensor[:1]])
    elif kind == 4:
        tensors[name] = tensor.to(draw.choice([torch.int32, torch.int64, torch.float32]))
    elif kind == 5:
        tensors[name] = tensor[None].clone()
    elif name.endswith(("positions", "length", "real", "token_ids")):
        flat = tensor.view(-1)
        flat[draw.randrange(len(flat))] = draw.choice([0, 1, 5, 127])
    else:
        del tensors[name]


def cache_case(path: Path, model: Any, draw: random.Random, right: Any = None) -> str:
    """Damage a copy of a cache file and use it; `right` is what comes of the file itself."""
    other, signed = path.with_name("mutant.kv"), draw.random() < 0.6
    if not signed:
        content = path.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        until = head if draw.random() < 0.6 else len(content)
        other.write_bytes(bytes_changed(content, draw, until))
    else:
        tensors, record = archive.read(path)
        if draw.random() < 0.6:
            record = json_changed(record, draw)
            record.setdefault("tensors", {})
        else:
            tensors_changed(tensors, draw)
        try:
            archive.write(other, tensors, record)
        except (KvtrimError, TypeError, UnicodeEncodeError, ValueError):
            return "unwritable"
    right = continued(path, model) if right is None else right
    return judged(lambda: continued(other, model), right, signed)


def continued(path: Path, model: Any) -> tuple[Any, ...]:
    """What comes of a cache: what it says it is, and the logits of three more tokens."""
    cache = kvtrim.load_cache(path, model)
    said = (cache.seen, cache.method, cache.template, cache.held_bytes)
    logits = []
    with torch.no_grad(), kvtrim.attach(model):
        for token in (9, 17, 33):
            ids = torch.full((len(cache.session.state.reading.lengths), 1), token)
            logits.append(model(ids, past_key_values=cache).logits)
    return said, torch.cat(logits, dim=1)


def judged(make: Callable[[], Any], right: Any, may_differ: bool = False) -> str:
    """What came of a mutant. One that was signed again says something else on purpose."""
    try:
        found = make()
    except KvtrimError:
        return REFUSED
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"{FOREIGN} {type(error).__name__} at {place}: {str(error)[:200]}"
    same = found[0] == right[0] and torch.equal(found[1], right[1])
    return HARMLESS if same else OTHER if may_differ else ACCEPTED


def caches(folder: Path) -> tuple[Any, list[Path]]:
    """A model, and saved caches of methods that keep different things."""
    model, found = models.tiny("llama", dtype=torch.float32), []
    for name, options in (
        ("adakv", {"schedule": "every-4"}), ("cake", {}), ("shotkv", {}), ("gemfilter", {}),
        ("h2o", {}), ("full", {}),
    ):  # fmt: skip
        cache = kvtrim.Cache(model, name, 24, **small(name), **options)
        ids, mask = models.prompt(48, rows=2), torch.ones(2, 48, dtype=torch.long)
        if name != "gemfilter":
            mask[0, :6] = 0
        with torch.no_grad(), kvtrim.attach(model):
            model(ids, attention_mask=mask, past_key_values=cache)
        found.append(folder / f"{name}.kv")
        cache.save(found[-1])
    return model, found


def read_model(where: Path) -> tuple[Any, torch.Tensor]:
    """What comes of a model's files."""
    model, tokenizer = kvtrim.load(where, device="cpu")
    ids = torch.arange(4, 16)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        return tokenizer.get_vocab(), model(ids).logits


def gguf_case(path: Path, right: Any, draw: random.Random) -> str:
    """Damage the header of a copy of a GGUF file and load it."""
    other = path.with_name("mutant.gguf")
    content = path.read_bytes()
    other.write_bytes(bytes_changed(content, draw, int(path.with_suffix(".head").read_text())))
    return judged(lambda: read_model(other), right, True)


def weights_case(folder: Path, right: Any, draw: random.Random) -> str:
    """Damage a file of a copy of a model's folder and load it."""
    other = folder.with_name("mutant")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    path = draw.choice(
        [p for p in sorted(other.iterdir()) if p.suffix in (".json", ".safetensors")]
    )
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.5:
        text = json.dumps(json_changed(json.loads(content), draw), default=str)
        path.write_text(draw.choice([text, text, "[" * 5000, '{"a": ' * 3000, "", "5"]))
    else:
        head = 8 + int.from_bytes(content[:8], "little")
        until = min(len(content), head) if path.suffix == ".safetensors" else len(content)
        path.write_bytes(bytes_changed(content, draw, until))
    return judged(lambda: read_model(other), right, True)


def search(kind: str, count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Try so many mutants.

    Returns:
        How many came to which end, and those that are wrong.
    """
    if kind == "cache":
        model, paths = caches(folder)
        right = {path: continued(path, model) for path in paths}

        def tried(draw: random.Random) -> str:
            path = draw.choice(paths)
            return cache_case(path, model, draw, right[path])

    elif kind == "gguf":
        path, right = ggufs(folder)

        def tried(draw: random.Random) -> str:
            return gguf_case(path, right, draw)

    else:
        models.tiny("llama", dtype=torch.float32).save_pretrained(folder / "model")
        models.tokenizer().save_pretrained(folder / "model")
        right = read_model(folder / "model")

        def tried(draw: random.Random) -> str:
            return weights_case(folder / "model", right, draw)

    ends, wrong = Counter[str](), []
    for number in range(count):
        end = tried(random.Random(f"{kind} {seed} {number}"))
        ends[end.partition(" ")[0]] += 1
        if end.startswith(WRONG):
            wrong.append(f"{kind} {seed} {number}: {end}")
    return ends, wrong


def ggufs(folder: Path) -> tuple[Path, Any]:
    """A tiny GGUF file, where its header ends, and what comes of it."""
    import gguf

    from hf.test_load import write_gguf

    path = folder / "tiny.gguf"
    write_gguf(path)
    start = gguf.GGUFReader(str(path)).tensors[0].data_offset
    path.with_suffix(".head").write_text(str(start))
    return path, read_model(path)


def main() -> None:
    """Search, and leave with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["cache", "gguf", "weights"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ends, wrong = search(asked.kind, asked.count, asked.seed, Path(folder))
    for line in wrong:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{asked.count} {asked.kind}: {dict(ends)}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
