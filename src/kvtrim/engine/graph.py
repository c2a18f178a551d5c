"""Decoding one token at a time over buffers that stay where they are, so a step can be captured.

After the prompt, a method that evicts nothing more only appends and attends. `Steps` takes over
from the session for that time: room for all new tokens is reserved at once, and lengths and
positions live on the device, so every step launches the same kernels with the same arguments. A
`Capture` makes one step a CUDA graph, which costs the host one launch per token; a `Stepper` has
one of a session's. Knows nothing of transformers: it is given the forward pass as a function.
"""

from collections.abc import Callable

import torch

from kvtrim.cache.store import BIAS
from kvtrim.engine.layer import Call, writable
from kvtrim.engine.session import Session
from kvtrim.errors import CacheError
from kvtrim.kernels import available
from kvtrim.types import Float, Int, Tensor

Forward = Callable[[Int[Tensor, "B 1"], Int[Tensor, "B 1"]], Float[Tensor, "B V"]]
"""Token ids and their positions to the logits of the next tokens."""

_WARM_UP = 2  # steps before a capture: compile kernels, fill allocators


def obstacle(session: Session, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the steps after this session's prompt cannot be captured; None if they can.

    Args:
        device, dtype: where and in which number format the model runs.
    """
    method = session.method
    if method.schedule.every is not None:
        return "the method evicts while tokens are generated"
    if method.positions == "rolled":
        return "the method turns the held keys at every step"
    if session.impl not in ("auto", "triton"):
        return f"impl={session.impl!r} needs lengths on the host"
    if device.type != "cuda" and session.impl != "triton":
        return "no CUDA device"
    found = available.obstacle(device.type)
    if found is not None:
        return found
    return (
        None if dtype in available.FORMATS else f"numbers are {str(dtype).removeprefix('torch.')}"
    )


class Steps:
    """Stands in for a session while single tokens are appended.

    Args:
        session: its prompt was read, and `obstacle` finds nothing.
        room: the most tokens that will come.

    Raises:
        CacheError: the prompt was not read to its end.
    """

    def __init__(self, session: Session, room: int):
        from kvtrim.kernels.split import Tiles

        state = session.state
        if session.in_prompt or session.under_way:
            raise CacheError("the prompt has to be read before single tokens are appended to it")
        self.session, self.room, self.taken = session, room, 0
        self.stores = state.stores()
        with writable():
            for store in self.stores:
                store.reserve(room)
        device = self.stores[0].keys.device
        self.start = [store.start.to(device) for store in self.stores]
        self.tiles = [Tiles.of(store.length + room, device) for store in self.stores]
        last = torch.tensor(state.reading.lengths)[:, None] - 1
        closed_up = torch.tensor(state.closed_up or [0] * len(last))[:, None]
        # all that a step changes, in one tensor, so that one launch moves everything on by a token
        changing = [*(store.length for store in self.stores), last]
        self._counters = torch.cat([each.flatten() for each in changing]).to(device)
        parts = self._counters.split([each.numel() for each in changing])
        *self.length, self.position = (
            part.view(each.shape) for part, each in zip(parts, changing, strict=True)
        )
        self._behind = closed_up.to(device)

    @property
    def positions(self) -> Int[Tensor, "B 1"]:
        """Where the model has the tokens of the step at hand."""
        return self.position - self._behind

    def advance(self) -> None:
        """The next step begins; on the device."""
        self._counters += 1

    def attend(self, index: int, call: Call) -> Float[Tensor, "B H 1 E"]:
        """Append one layer's new entries and attend to everything held; see `Session.attend`."""
        from kvtrim.kernels import append, split

        if self.session.method.granularity == "query":
            call = call.per_query_head()
        store, start, length = self.stores[index], self.start[index], self.length[index]
        append.append(store.buffers, start, length, call.keys, call.values, self.position)
        return split.ragged(
            call.queries,
            store.keys,
            store.values,
            start,
            length,
            call.scale,
            call.softcap,
            self.tiles[index],
            store.buffers.get(BIAS),
        ).out

    def snapshot(self) -> Tensor:
        """The counters, to go back to."""
        return self._counters.clone()

    def restore(self, counters: Tensor) -> None:
        """Forget the steps since a snapshot was taken."""
        self._counters.copy_(counters)

    def close(self) -> None:
        """Give the session back, with the tokens that were taken."""
        self.session.resume(self.taken)
        with writable():
            for store in self.stores:
                store.grow(self.taken)
                store.cut_back(store.length)  # what was reserved for tokens that never came


class Capture:
    """A step that is done over and over on the same buffers; on CUDA one replay of a graph.

    Args:
        step: leaves its result in a tensor, which the next call overwrites.
        device: where the buffers are.
        undo: takes back what a step has changed, after each one that is done on trial; by default
            the next one writes over all of it.
    """

    def __init__(
        self,
        step: Callable[[], Tensor],
        device: torch.device,
        undo: Callable[[], None] = lambda: None,
    ):
        self._step, self._undo, self._device = step, undo, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None
        self.plain: str | None = None  # why the steps are not captured, if they are not
        with available.on(device):
            self._try_capture()

    def __call__(self) -> Tensor:
        """Do one step."""
        if self._graph is None or self._out is None:
            return self._step()
        with available.on(self._device):
            self._graph.replay()
        return self._out

    def _try_capture(self) -> None:
        """Capture a step; a model whose pass cannot be captured goes on step by step."""
        if self._device.type != "cuda":
            self.plain = "interpreted on a CPU"
            return
        stream = torch.cuda.current_stream()
        try:
            self._capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that fails may leave its own behind
            self._undo()
            self._graph = None
            self.plain = f"could not be captured ({' '.join(str(error).split())[:200]})"

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
                self._undo()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = self._step()


class Stepper:
    """One step after the other; on CUDA each is one replay of a captured graph.

    Args:
        forward: the model's pass over one token per prompt, through these steps.
        steps: made for the same session, which follows them until `close`.
    """

    def __init__(self, forward: Forward, steps: Steps):
        self.steps, self._forward = steps, forward
        rows, device = steps.position.shape[0], steps.position.device
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        steps.session.lend(steps)
        before = steps.snapshot()
        try:
            self._capture = Capture(self._step, device, lambda: steps.restore(before))
        except BaseException:
            steps.close()
            raise
        self.plain = self._capture.plain  # why the steps are not captured, if they are not

    def __call__(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Read one token per prompt. The logits are overwritten by the next call.

        Raises:
            IndexError: more steps than there is room for.
        """
        if self.steps.taken >= self.steps.room:
            raise IndexError(f"room was reserved for {self.steps.room} steps")
        self._ids.copy_(ids)
        logits = self._capture()
        self.steps.taken += 1
        return logits

    def close(self) -> None:
        """Give the session back; what was captured is freed."""
        self.steps.close()
        del self._capture

    def _step(self) -> Float[Tensor, "B V"]:
        self.steps.advance()
        return self._forward(self._ids, self.steps.positions)
