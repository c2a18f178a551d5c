"""When entries are evicted. A declaration that the engine acts on; no logic of its own."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from kvtrim.errors import UsageError
from kvtrim.methods.ranges import Declared, Share, Some, Tokens


@dataclass(frozen=True)
class Schedule(Declared):
    """When to evict.

    By default once, at the end of the prompt; what is generated is appended and stays. With
    `every` the cache is cut back to its budget again after every so many tokens, in generation
    and in later turns, so that it stays bounded. `ahead` cuts before the new token is read
    instead of after, so that a query never sees more than the budget (StreamingLLM).

    With `chunks` a prompt that comes in several passes is cut back after each of them, not only at
    its end, so that memory is bounded by chunk and budget however long the prompt is. Later chunks
    see what is left of the earlier ones, so the result depends on the size of the chunks.

    With region="generated" what was kept of the prompt stays for good, and `every` concerns the
    generated tokens alone: of T generated so far max(1, ceil(share * T)) stay, as many in every
    layer and head, by the policy's score and token by token. Generated is what a pass over a
    single token reads after the prompt. A pass over several is a further turn: it stays, and so
    does what is held of the answer before it.

    With region="blocks" (PyramidInfer) the prompt stays likewise, and of the generated tokens each
    block of `every` is cut once, as soon as it stands right behind the newest token and `newest`
    others: max(1, int(every * share * rho_l)) of its tokens stay for good. `deepest` is what rho
    would come to behind the last of L layers:

        rho_l = (1 - deepest) * (cos(pi * l / L) + 1) / 2 + deepest
    """

    every: Some | None = None  # evict again after so many tokens; none is once, after the prompt
    ahead: bool = False  # evict before the new tokens are read instead of after
    chunks: bool = False  # evict after every pass of a prompt that comes in several
    region: Literal["all", "generated", "blocks"] = "all"  # what is evicted from after the prompt
    share: Share | None = None  # of the generated tokens, that stay; none: the prompt's own share
    newest: Tokens | Share = 0  # generated tokens that always stay, counted from the end: a
    # number, or a share of what was read before them
    deepest: Share = 1.0  # of `share`, for a layer behind the last one; shallow ones have it whole

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning together."""
        super().__post_init__()
        if self.ahead and self.every is None:
            raise UsageError("ahead says when every acts: set every too, or ahead=false")
        generated, region = self.region != "all", f"region={self.region}"
        if not generated and (self.share is not None or self.newest):
            raise UsageError(
                "share and newest are about generated tokens; set region=generated or "
                "region=blocks"
            )
        if self.region != "blocks" and self.deepest < 1:
            raise UsageError("deepest is about blocks of generated tokens; set region=blocks")
        if self.region == "blocks" and self.every is None:
            raise UsageError("region=blocks cuts blocks of so many tokens: set every too")
        if generated and self.ahead:
            raise UsageError(f"{region} evicts after a token was read; set ahead=false")
        if generated and self.chunks:
            raise UsageError(f"{region} keeps whole parts of the prompt; set chunks=false")

    def __str__(self) -> str:
        if self.every is None:
            return "after every chunk of the prompt" if self.chunks else "end of prompt"
        if self.region == "blocks":
            return f"end of prompt; generated: blocks of {self.every}"
        text = "every step" if self.every == 1 else f"every {self.every} steps"
        return text if self.region == "all" else f"end of prompt; generated: {text}"

    def newest_behind(self, before: int) -> int:
        """How many generated tokens always stay behind so many tokens read before them."""
        return self.newest if isinstance(self.newest, int) else int(before * self.newest)

    def share_of_layer(self, layer: int, layers: int) -> float:
        """Rho of a layer: what of `share` it has."""
        return (1 - self.deepest) * (cos(pi * layer / layers) + 1) / 2 + self.deepest
