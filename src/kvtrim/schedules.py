"""When entries are evicted. A declaration that the engine acts on; no logic of its own."""

from dataclasses import dataclass

from kvtrim.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """When to evict.

    By default once, at the end of the prompt; what is generated is appended and stays. With
    `every` the cache is cut back to its budget again after every so many tokens, in generation
    and in later turns, so that it stays bounded. `ahead` cuts before the new token is read
    instead of after, so that a query never sees more than the budget (StreamingLLM).
    """

    every: int | None = None  # evict again after so many tokens; none is once, after the prompt
    ahead: bool = False  # evict before the new tokens are read instead of after

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UsageError(
                f"every={self.every}: evict after at least one token, or leave it out"
            )

    def __str__(self) -> str:
        if self.every is None:
            return "end of prompt"
        return "every step" if self.every == 1 else f"every {self.every} steps"
