"""Small faults of the code, each of which a test must notice.

python tests/mutants.py            # all of them, in copies of src; about 20 s of CPU time each
python tests/mutants.py window     # those whose names say that

Prints the test that noticed each. A fault that nothing notices, or that fits the code no longer,
makes the command fail.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

UNFIT = "NO LONGER FITS THE CODE"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` once in a file; these tests run until one fails."""

    file: str
    old: str
    new: str
    tests: str


# what is held, counted and given back
MEMORY = {
    "freed slots are not given back": Mutant(
        "cache/store.py",
        "roomy = bool((self.capacity > kept.counts + 2 * slack(kept.counts)).any())",
        "roomy = False",
        "cache hf/test_cache.py",
    ),
    "room behind a cut back store is not given back": Mutant(
        "cache/store.py",
        "if bool((self.capacity > self.length + slack(self.length)).any()):",
        "if False:",
        "cache hf/test_decode.py hf/test_cache.py hf/test_going_back.py",
    ),
    "slack is not counted": Mutant(
        "cache/store.py",
        "return sum(buffer.nbytes for buffer in self.buffers.values())",
        "held = int(self.length.sum())\n"
        "        return sum(buffer[:held].nbytes for buffer in self.buffers.values())",
        "cache hf/test_cache.py",
    ),
    "remembered queries are not counted": Mutant(
        "engine/layer.py",
        "parts = (self.queries, self.hidden, self.store,",
        "parts = (self.hidden, self.store,",
        "hf/test_cache.py hf/test_hidden.py",
    ),
    "remembered hidden states are not counted": Mutant(
        "engine/layer.py",
        "parts = (self.queries, self.hidden, self.store,",
        "parts = (self.queries, self.store,",
        "hf/test_cache.py hf/test_hidden.py",
    ),
    "passes that can be taken back are not counted": Mutant(
        "engine/state.py",
        "return sum(each.nbytes for each in (*self.layers, *self.past))",
        "return sum(each.nbytes for each in self.layers)",
        "hf/test_going_back.py",
    ),
    "methods that read in chunks are replayed": Mutant(
        "hf/replay.py",
        "if other.method.propagation.narrows or other.method.schedule.chunks:",
        "if other.method.propagation.narrows:",
        "hf/test_replay.py",
    ),
}
RULES = {
    "the window is one short": Mutant(
        "methods/selection.py",
        "ends = (lengths - recent).clamp(min=0)",
        "ends = (lengths - max(0, recent - 1)).clamp(min=0)",
        "methods/test_selection.py methods/test_contract.py",
    ),
    "sinks are not kept": Mutant(
        "methods/selection.py",
        "first = min(sinks, width)",
        "first = 0",
        "methods/test_selection.py methods/test_contract.py",
    ),
    "a group's mean is its sum": Mutant(
        "methods/policies/ops.py",
        'return grouped.sum(dim=2) if how == "sum" else grouped.mean(dim=2)',
        "return grouped.sum(dim=2)",
        "methods/test_formulas.py methods engine/test_golden.py",
    ),
    "attention is normalised without the newest slot": Mutant(
        "methods/policies/ops.py",
        "logits[..., seen - rows :].masked_fill_(slot[seen - rows :] > last, -torch.inf)",
        "logits[..., seen - rows :].masked_fill_(slot[seen - rows :] >= last, -torch.inf)",
        "methods/test_formulas.py methods engine/test_golden.py",
    ),
    "heavy hitters forget what earlier passes gave": Mutant(
        "methods/policies/h2o.py",
        "return sums if layer.carried is None else layer.carried + sums",
        "return sums",
        "methods/test_h2o.py hf/test_generation.py",
    ),
    "the floor of a head is not added": Mutant(
        "methods/budgets/per_head.py",
        "ideal = won.double() * (1 - self.floor) + even.floor()",
        "ideal = won.double() + 0 * even",
        "methods/test_budgets.py engine/test_golden.py",
    ),
    "the mask ignores padding": Mutant(
        "engine/tokens.py",
        "return Pass(columns, first, [row.nonzero()[:, 0] for row in new])",
        "return Pass(columns, first, None)",
        "hf/test_generation.py",
    ),
    "beams keep each other's queries": Mutant(
        "engine/state.py",
        "held.queries = held.queries[rows.to(held.queries.device)]",
        "pass",
        "hf/test_batches.py",
    ),
    "a copy shares its entries": Mutant(
        "engine/layer.py",
        "return replace(self, store=None if self.store is None else self.store.copy())",
        "return replace(self)",
        "hf/test_going_back.py hf/test_cache.py",
    ),
    "tokens that go on stand one further": Mutant(
        "engine/propagation.py",
        'positions.append(now.row_positions(row, torch.device("cpu"))[0, 0][own])',
        'positions.append(now.row_positions(row, torch.device("cpu"))[0, 0][own] + 1)',
        "methods/test_propagation.py hf/test_models.py propagation",
    ),
    "the divergence is the other way round": Mutant(
        "bench/eval/decode.py",
        "return (true.exp() * (true - log)).sum().double().cpu()",
        "return (log.exp() * (log - true)).sum().double().cpu()",
        "bench/test_evaluate.py::test_loss_and_divergence_are_those_of_a_pass_over_the_answer",
    ),
}
# attaching, threads, and going back
STATE = {
    "the first block that ends detaches everybody": Mutant(
        "hf/attach.py",
        "self.open.remove(one)\n        if self.open:\n            return",
        "self.open.clear()",
        "hf/test_sharing.py hf/test_attach.py",
    ),
    "blocks of other threads are detached": Mutant(
        "hf/attach.py",
        "mine = [one for one in newest if one.thread == me]",
        "mine = newest",
        "hf/test_sharing.py",
    ),
    "threads share what a pass manages": Mutant(
        "hf/attention.py",
        "class _Managing(threading.local):",
        "class _Managing:",
        "hf/test_sharing.py",
    ),
    "a changed attention implementation goes unnoticed": Mutant(
        "hf/attach.py", "if now != NAME:", "if False:", "hf/test_sharing.py"
    ),
    "a cache of another model is taken": Mutant(
        "hf/attach.py",
        "if cache.decoder is not decoder:",
        "if False:",
        "hf/test_cache.py hf/test_sharing.py hf/test_attach.py",
    ),
    "a model that shares its configuration is changed": Mutant(
        "hf/attention.py", "if count > 1:", "if False:", "hf/test_sharing.py hf/test_attach.py"
    ),
    "a copy of an attached model is not attached by itself": Mutant(
        "hf/attach.py",
        "other.open = [Attached(other)]",
        "other.open = self.open",
        "hf/test_sharing.py hf/test_attach.py",
    ),
    "a detached model reads into a cache": Mutant(
        "hf/layers.py",
        "raise NotAttachedError(",
        "return key_states, value_states\n        raise NotAttachedError(",
        "hf/test_sharing.py hf/test_cache.py",
    ),
    "weights of attention are empty without a word": Mutant(
        "hf/attach.py",
        'if getattr(decoder.config, "output_attentions", False) if asked is None else asked:',
        "if False:",
        "hf/test_attach.py",
    ),
    "gradients are lost without a word": Mutant(
        "hf/attention.py",
        "if torch.is_grad_enabled() and any(",
        "if False and any(",
        "hf/test_attach.py",
    ),
    "an interrupted pass goes unnoticed": Mutant(
        "engine/past.py", "if self._cutting is not None:", "if False:", "hf/test_going_back.py"
    ),
    "a crop on a model that slides takes back a part": Mutant(
        "hf/layers.py",
        "return 0 <= needed <= _some(self.keys).shape[2] - count",
        "return True",
        "hf/test_going_back.py",
    ),
    "a crop leaves carried statistics": Mutant(
        "engine/state.py",
        "            if carried is None:\n                held.store.drop_column(CARRIED)\n"
        "            else:\n",
        "            if carried is not None and False:\n",
        "hf/test_going_back.py",
    ),
    "what stays of a pass is not read again": Mutant(
        "engine/past.py",
        "if past.seen < target:",
        "if False:",
        "hf/test_going_back.py",
    ),
    "marks of another cache are taken": Mutant(
        "engine/past.py", "if mark.owner is not self:", "if False:", "hf/test_going_back.py"
    ),
    "drafts are not remembered": Mutant(
        "engine/past.py",
        "evicts = self.recording and (plan.after or plan.before)",
        "evicts = False",
        "hf/test_going_back.py",
    ),
}
MUTANTS = MEMORY | RULES | STATE


class _First:
    """The first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (not even loaded)"


def noticed(mutant: Mutant) -> str:
    """The test that a fault fails; empty if there is none."""
    import pytest

    with tempfile.TemporaryDirectory(prefix="kvtrim-mutant-") as folder:
        copy = shutil.copytree(ROOT / "src", Path(folder) / "src")
        path = copy / "kvtrim" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return UNFIT
        path.write_text(text.replace(mutant.old, mutant.new))
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            sys.path.insert(0, str(copy))
            first = _First()
            tests = [str(ROOT / "tests" / name) for name in mutant.tests.split()]
            known = "ignore::pytest.PytestAssertRewriteWarning"  # what is loaded already
            how = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", known]
            end = 99
            try:
                end = int(pytest.main([*how, *tests], plugins=[first]))
            finally:
                first.name = first.name or ("" if end == 0 else f"DID NOT RUN ({end})")
                os.write(into, first.name.encode())
                os._exit(0)
        os.close(into)
        with os.fdopen(out) as answer:
            name = answer.read()
        os.waitpid(child, 0)
    return name


def main(wanted: list[str]) -> int:
    """Try them; the number that nothing noticed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch  # noqa: F401 (shared by all that are tried)
    import transformers.models.llama.modeling_llama  # noqa: F401

    left = 0
    for name, mutant in MUTANTS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        by = noticed(mutant)
        left += by in ("", UNFIT) or by.startswith("DID NOT")
        sys.stdout.write(f"{name}: {by or 'NOTHING NOTICED IT'}\n")
        sys.stdout.flush()
    return left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
