"""Attention of new queries over a layer's entries: here, and only here, its way is chosen."""

from typing import Protocol, runtime_checkable

from kvtrim.errors import UnknownNameError, UsageError
from kvtrim.kernels import reference, sdpa
from kvtrim.kernels.available import FORMATS, MOST_QUERIES, WIDEST, obstacle, require_triton
from kvtrim.types import Counts, Float, Tensor

IMPLS = ("auto", "reference", "sdpa", "triton", "varlen")
"""What `impl` may be.

"auto" takes triton where it pays (a few new tokens on CUDA) and sdpa elsewhere; "reference" is
slow and exact; "varlen" is torch's FlashAttention on CUDA. A prompt that is read at once, with
nothing before it, goes through sdpa under every name but "reference".
"""


BIAS = "bias"
"""The column of what is added to each entry's logit, where entries were refitted."""


@runtime_checkable
class Entries(Protocol):
    """What attention asks of a layer's store: a run of slots for each (prompt, KV head)."""

    buffers: dict[str, Tensor]  # "keys" [T, D], "values" [T, E], and columns [T]
    start: Counts
    length: Counts
    width: int | None  # entries per head, where all heads hold the same number

    def keys_and_values(self) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S E"]]:
        """K and V where all heads hold the same number."""
        ...

    def column(self, name: str) -> Float[Tensor, "B K S"]:
        """One number per entry."""
        ...

    def settle(self) -> None:
        """From here on `buffers` hold the entries."""


def require_known(impl: str) -> None:
    """Refuse an implementation nobody has. An explicit request is never replaced silently.

    Raises:
        UnknownNameError: the name is not in `IMPLS`.
    """
    if impl not in IMPLS:
        raise UnknownNameError("attention implementation", impl, IMPLS)


def choose(impl: str, queries: Float[Tensor, "B H Q D"], slots: int, values: Tensor) -> str:
    """The implementation that attends these queries to so many slots of the longest head."""
    if impl == "reference":
        return impl
    if queries.shape[2] >= slots:
        return "sdpa"  # a whole prompt
    if impl != "auto":
        return impl
    small = queries.shape[2] <= MOST_QUERIES and max(queries.shape[-1], values.shape[-1]) <= WIDEST
    able = queries.is_cuda and small and queries.dtype in FORMATS and obstacle("cuda") is None
    return "triton" if able else "sdpa"


def attend(
    queries: Float[Tensor, "B H Q D"],
    store: Entries,
    scale: float,
    softcap: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B H Q E"]:
    """Attend to everything held; the last Q entries of each head belong to the Q queries.

    Raises:
        UsageError: the implementation that was asked for cannot run here.
    """
    name = "sdpa"
    if queries.is_cuda or impl not in ("auto", "sdpa"):
        name = choose(impl, queries, int(store.length.max()), store.buffers["values"])
    bias = store.buffers.get(BIAS)
    if name == "sdpa" and store.width is not None:
        own = None if bias is None else store.column(BIAS)
        return sdpa.dense(queries, *store.keys_and_values(), scale, softcap, own)
    store.settle()
    run = store.buffers["keys"], store.buffers["values"], store.start, store.length
    if name == "triton":
        require_triton(queries.device)
        from kvtrim.kernels import split

        return split.ragged(queries, *run, scale, softcap, bias=bias).out
    if name == "varlen":
        from kvtrim.kernels import varlen

        if bias is not None:
            raise UsageError(
                "impl='varlen' is torch's FlashAttention, which adds nothing to logits; use "
                "impl='triton' or 'sdpa', or refit=values"
            )
        return varlen.ragged(queries, *run, scale, softcap)
    kernel = reference.ragged if name == "reference" else sdpa.ragged
    return kernel(queries, *run, scale, softcap, bias)
