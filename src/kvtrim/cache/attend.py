"""Attention of new queries over a store, by the implementation asked for."""

from kvtrim.cache.store import LayerStore
from kvtrim.errors import UnknownNameError
from kvtrim.kernels import reference, sdpa
from kvtrim.types import Float, Tensor

IMPLS = ("auto", "reference", "sdpa")
"""What `impl` may be: "auto" is sdpa, "reference" is slow and exact."""


def require_known(impl: str) -> None:
    """Refuse an implementation nobody has. An explicit request is never replaced silently.

    Raises:
        UnknownNameError: the name is not in `IMPLS`.
    """
    if impl not in IMPLS:
        raise UnknownNameError("attention implementation", impl, IMPLS)


def attend(
    queries: Float[Tensor, "B H Q D"],
    store: LayerStore,
    scale: float,
    softcap: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B H Q E"]:
    """Attend to everything held; the last Q entries of each head belong to the Q queries."""
    if impl != "reference" and store.width is not None:
        return sdpa.dense(queries, *store.keys_and_values(), scale, softcap)
    store.settle()
    kernel = reference.ragged if impl == "reference" else sdpa.ragged
    return kernel(queries, store.keys, store.values, store.start, store.length, scale, softcap)
