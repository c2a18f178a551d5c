"""A method is a product: policy x budget x schedule x propagation x unit x refit."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvtrim.errors import UsageError
from kvtrim.methods.budgets import Budget, Uniform
from kvtrim.methods.keep import Keep
from kvtrim.methods.policies.base import WHOLE, Policy
from kvtrim.methods.propagation import Everything, Propagation
from kvtrim.methods.ranges import Declared, Some, Tokens
from kvtrim.methods.refit import Refit, Unchanged
from kvtrim.methods.schedule import Schedule
from kvtrim.methods.unit import Token, Unit
from kvtrim.types import Target

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method(Declared):
    """A published way to make the cache small."""

    policy: Policy
    budget: Budget = field(default_factory=Uniform)
    schedule: Schedule = field(default_factory=Schedule)
    propagation: Propagation = field(default_factory=Everything)
    unit: Unit = field(default_factory=Token)
    refit: Refit = field(default_factory=Unchanged)  # what the entries that stay become
    granularity: Literal["kv", "query"] = "kv"  # which heads hold entries of their own
    skip_layers: tuple[Tokens, ...] = ()  # layers that keep everything
    reuse: Some = 1  # so many neighbouring layers share the slots that the first of them kept
    demote: bool = False  # scores of punctuation and blanks that repeat count a quarter
    positions: Literal["original", "rolled"] = "original"  # where kept keys stand for later
    # queries: where they were read, or closed up at their slot numbers
    source: str = ""
    use: str = ""  # one sentence: when it is the method to take
    cost: str = ""  # one sentence: what it computes and holds beside the entries it keeps
    presets: Mapping[str, Settings] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Refuse parameters outside what they declare, and parts that do not go together."""
        super().__post_init__()
        if self.policy.probes and (self.schedule.every is not None or self.skip_layers):
            raise UsageError(
                f"{type(self.policy).__name__} probes the prompt once: "
                "use schedule=prompt and no skip_layers"
            )
        if self.policy.turns and (self.positions == "rolled" or self.propagation.narrows):
            raise UsageError(
                f"{type(self.policy).__name__} turns queries from where they were read: set "
                "positions=original and propagation=everything"
            )
        idle = self.budget.unlimited and self.schedule.region != "blocks"
        if idle and (self.schedule != Schedule() or self.skip_layers):
            raise UsageError(
                f"budget={type(self.budget).__name__} never evicts, so a schedule and skip_layers "
                "have nothing to act on: leave them out, or set another budget"
            )
        if self.demote and (self.budget.unlimited or self.propagation.restarts):
            raise UsageError(
                "demote=true lowers the scores by which entries are evicted, at the places where "
                "they were read: a budget that never evicts and propagation=restart have none, so "
                "leave it out, or set budget=uniform and propagation=everything"
            )
        if self.refit.changes and (self.schedule.chunks or self.positions == "rolled"):
            raise UsageError(
                "a refit fits what stays to what the full cache answers at the original "
                "positions: set chunks=false and positions=original, or refit=none"
            )
        if self.schedule.ahead and self.policy.lookback():
            raise UsageError(
                f"ahead=True evicts before the new tokens' queries exist, and "
                f"{type(self.policy).__name__} scores by queries; leave ahead=False"
            )
        if self.propagation.narrows:
            self._require_narrowable()
        if self.schedule.chunks:
            self._require_chunkable()
        if not self.budget.model_wide:
            return
        if self.schedule.region != "all":
            region = f"region={self.schedule.region}"
            raise UsageError(f"{region} and a model-wide budget do not go together")
        if not self.unit.single or self.reuse > 1 or self.skip_layers or self.schedule.ahead:
            raise UsageError(
                "a model-wide budget deals with single tokens of every layer: use unit=token, "
                "reuse=1, no skip_layers, ahead=no, or another budget"
            )
        if self.policy.first_stage < 1:
            raise UsageError(
                f"{type(self.policy).__name__} chooses in two stages inside each head, which a "
                "model-wide budget cannot do; use budget=uniform or budget=per-head"
            )

    def require_room(self, keep: Keep) -> None:
        """Refuse a number of tokens that leaves nothing to choose.

        Raises:
            BudgetError: it is below what the method always keeps.
        """
        if keep.kind == "tokens" and not self.budget.unlimited:
            protected = self.policy.sinks + self.policy.recent(int(keep.amount))
            keep.entries(prompt=protected + 1, protected=protected, entry_bytes=1)

    def require_passes(self, prefill_chunk: int | None) -> None:
        """Refuse to evict after every chunk of a prompt that is read in one pass.

        Raises:
            UsageError: `chunks` without a prefill chunk.
        """
        if self.schedule.chunks and prefill_chunk is None:
            raise UsageError(
                "chunks=true evicts after every chunk of the prompt, which is read in one pass: "
                "give a prefill chunk too (prefill_chunk=512, --prefill-chunk 512)"
            )

    def _require_narrowable(self) -> None:
        """Refuse parts that expect every layer to read the whole prompt."""
        if self.policy.probes or self.reuse > 1:
            raise UsageError(
                f"{type(self.propagation).__name__} lets some layers read a part of the prompt, "
                "which a policy that probes it and reuse above 1 cannot serve: set "
                "propagation=everything, or another policy and reuse=1"
            )
        if self.propagation.restarts and self.positions == "rolled":
            raise UsageError("a restart closes positions up already; set positions=original")

    def _require_chunkable(self) -> None:
        """Refuse parts that choose over the whole prompt, and can only do so at its end."""
        parts = {
            f"policy={type(self.policy).__name__}": self.policy.probes
            or self.policy.lookback() == WHOLE,
            f"budget={type(self.budget).__name__}": self.budget.model_wide and self.budget.settles,
            f"propagation={type(self.propagation).__name__}": self.propagation.narrows,
            f"unit={type(self.unit).__name__}": not self.unit.single,
            f"reuse={self.reuse}": self.reuse > 1,
        }
        whole = [name for name, needed in parts.items() if needed]
        if whole:
            raise UsageError(
                f"chunks=true evicts before the prompt is complete, and {', '.join(whole)} needs "
                "all of it: leave chunks out (a prompt may still be read in chunks and is cut at "
                "its end), or take echo, snapkv, knorm, keydiff, curdkv, h2o, tova or "
                "streaming-llm"
            )

    @property
    def full(self) -> bool:
        """Nothing is ever left out, whatever the budget."""
        evicts = self.propagation.narrows or self.schedule.region == "blocks"
        return self.budget.unlimited and not evicts

    @property
    def holds_more(self) -> list[str]:
        """Why this method may hold clearly more of a prompt than `keep`, part by part."""
        skipped = ", ".join(map(str, self.skip_layers))
        own = f"everything stays in skip_layers={skipped}" if skipped else ""
        parts = (self.budget, self.propagation, self.unit)
        return [text for text in (own, *(part.holds_more for part in parts)) if text]

    @property
    def holds_less(self) -> list[str]:
        """Why this method may hold clearly less of a prompt than `keep`, part by part."""
        parts = (self.budget, self.propagation, self.unit)
        return [part.holds_less for part in parts if part.holds_less]

    def fitted(self, target: Target) -> "Method":
        """This method, made ready for one model.

        Errors as `fitted` of policy, budget and propagation.
        """
        behind = [layer for layer in self.skip_layers if layer >= target.layers]
        if behind:
            raise UsageError(
                f"skip_layers={behind[0]}: {target.name} has {target.layers} layers, 0 to "
                f"{target.layers - 1}"
            )
        policy = self.policy.fitted(target)
        budget, propagation = self.budget.fitted(target), self.propagation.fitted(target)
        return replace(self, policy=policy, budget=budget, propagation=propagation)
