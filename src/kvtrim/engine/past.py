"""Going back: a session's marks and crops.

Where entries are only appended, going back is forgetting the newest ones. Other passes change
what is remembered beside them: statistics, last queries, when a cut was due. Going back is then to
return to what the pass found, and to go through the part of it that stays again.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

from kvtrim.engine.cuts import Cuts
from kvtrim.engine.layer import Call
from kvtrim.engine.plan import Plan, in_prompt
from kvtrim.engine.state import Mark, Past, State
from kvtrim.errors import CacheError, UsageError
from kvtrim.methods.method import Method
from kvtrim.types import Tensor

RECALLED = 64
"""Columns of the longest pass of which a part can be taken back without announcing it."""

PASSES = 32
"""How many passes can be taken back."""


class Undoable(ABC):
    """A session that can go back to what it was before some of its passes."""

    method: Method
    state: State
    recording: bool
    _announced: bool
    _plan: Plan
    _past: Past | None
    _cutting: Cuts | None

    @abstractmethod
    def begin(self, rows: int, columns: int, mask: Tensor | None = None) -> None:
        """Start a pass over new columns."""

    @abstractmethod
    def absorb(self, index: int, call: Call) -> None:
        """Take in what one layer was handed."""

    @abstractmethod
    def end(self) -> None:
        """End the pass."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything that was read."""

    @property
    @abstractmethod
    def prompt_tokens(self) -> int | None:
        """Columns of the prompt if it comes in several passes."""

    @property
    def in_prompt(self) -> bool:
        """The pass at hand, or else the next one, reads the prompt."""
        return in_prompt(self.state, self.prompt_tokens)

    def mark(self) -> Mark:
        """Remember this state, for `rewind`.

        Raises:
            CacheError: a pass over this cache never ended.
        """
        self._require_idle()
        evicts = self.in_prompt or self.method.schedule.every is not None
        return replace(self.state.mark(evicts), owner=self)

    def rewind(self, mark: Mark) -> None:
        """Return to a marked state, also after an interrupted pass.

        Raises:
            CacheError: the mark was taken of another cache.
        """
        if mark.owner is not self:
            raise CacheError(
                "this mark was taken of another cache; rewind that one, or copy it and mark the "
                "copy"
            )
        self.state, self._cutting, self._announced = mark.restore(), None, False

    def require_croppable(self, columns: int) -> None:
        """Raise as `crop` would, and change nothing."""
        self._require_idle()
        seen = self.state.reading.seen
        if not 0 <= columns <= seen:
            raise CacheError(f"cannot take back {columns} tokens, {seen} were read")
        target = seen - columns
        if columns == 0 or target == 0 or target >= self.state.appended_from:
            return
        past = self._before(target)
        if past is None or not (past.seen == target or past.calls):
            gone = f"entries were evicted {seen - self.state.cut_at} tokens ago"
            if target >= self.state.cut_at:
                gone = f"{type(self.method.policy).__name__} has taken them into account"
            raise CacheError(
                f"cannot take back {columns} tokens: {gone}. Copy the cache before, or take a "
                "mark and rewind to it"
            )

    def crop(self, columns: int) -> None:
        """Take back the newest columns, as if they had never been read.

        Raises:
            CacheError: that cannot be; nothing has changed.
        """
        self.require_croppable(columns)
        state, target = self.state, self.state.reading.seen - columns
        past = None if target >= state.appended_from else self._before(target)
        if columns and target == 0:
            self.reset()
        elif columns and past is None:
            state.take_back(columns)
        elif columns and past is not None:
            older, state.past = state.past[: state.past.index(past)], []  # newer ones are let go
            self.state = past.restore()
            self.state.past = older
            if past.seen < target:
                self._again(past, target - past.seen)
        if self.recording:
            self.state.past = []  # what stays is settled

    # Passes that can be taken back

    def _require_recordable(self, columns: int) -> None:
        """Refuse drafts that could not be taken back.

        Raises:
            UsageError: saying which part of the method is in the way.
        """
        plan, policy = self._plan, self.method.policy
        if not self.recording or columns == 1:
            return
        part = None
        if plan.propagate:
            part = type(self.method.propagation).__name__
        elif policy.probes and self.in_prompt:
            part = type(policy).__name__
        elif self.method.schedule.ahead and not self.in_prompt:
            raise UsageError(
                "ahead=true evicts before drafts are read, and drafts that are turned down cannot "
                "undo that; set ahead=false, or leave speculative decoding out"
            )
        if part is not None:
            raise UsageError(
                f"{part} chooses over the whole prompt, and speculative decoding hands its first "
                "drafts over with it; use a method that only evicts, such as snapkv, or leave "
                "speculative decoding out"
            )

    def _remember_pass(self, columns: int, mask: Tensor | None) -> Past | None:
        """What it takes to take the pass back that begins; None if it only appends."""
        plan = self._plan
        appends = self.method.schedule.every is None and self.prompt_tokens is None
        appends = appends or (self.method.schedule.every is None and not self.in_prompt)
        if appends and not plan.propagate and not (self.recording and plan.after):
            return None
        evicts = self.recording and (plan.after or plan.before)
        part = (1 < columns <= RECALLED or (self.recording and columns > 1)) and not (
            plan.propagate or plan.before
        )
        stays = plan.carry and self.method.policy.foresees  # what is foretold once is not changed
        return Past.begin(self.state, columns, mask, evicts, part, changes=not stays)

    def _note(self, index: int, call: Call) -> None:
        if self._past is not None and not self._plan.probe:
            policy = self.method.policy
            self._past.note(index, call, policy.reads_hidden or policy.foresees)

    def _note_end(self, cuts: Cuts) -> None:
        """A pass was read: see how far back one can go now."""
        state, past, evicted = self.state, self._past, cuts.evicted
        if evicted:
            state.past = []
        if evicted or past is not None:
            state.appended_from = state.reading.seen
        if past is not None and (past.mark.reaches is None or not evicted):
            state.past = [*state.past, past][-PASSES:]
        self._past = None

    def _before(self, target: int) -> Past | None:
        """The pass that read column `target`, or begins there."""
        found = next((past for past in self.state.past[::-1] if past.seen <= target), None)
        return found if found is None or target <= found.seen + found.columns else None

    def _again(self, past: Past, columns: int) -> None:
        """Go through the first columns of a pass again."""
        mask, calls = past.part(columns)
        self.begin(len(next(iter(calls.values())).queries), columns, mask)
        for index, call in calls.items():
            self.absorb(index, call)
        self.end()

    def _require_idle(self) -> None:
        if self._cutting is not None:
            raise CacheError(
                "an earlier forward pass over this cache was interrupted, so its layers disagree; "
                "rewind it to a mark taken before, or start a new cache"
            )
