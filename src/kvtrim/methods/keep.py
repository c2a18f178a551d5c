"""`keep`, the budget a user asks for: tokens, a share of the prompt, or bytes of the cache."""

import re
from dataclasses import dataclass
from decimal import Decimal
from math import inf
from typing import Literal

from kvtrim.errors import BudgetError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_HINT = "use tokens (512), a share of the prompt (0.25, '25%' or '1/4') or bytes ('256MiB')"


@dataclass(frozen=True)
class Keep:
    """A parsed budget.

    Entries per KV head on average, protected slots (window, sinks) included.
    """

    kind: Literal["tokens", "share", "bytes"]
    amount: float

    @classmethod
    def parse(cls, given: "int | float | str | Keep") -> "Keep":
        """Read 512, 0.25, "25%", "1/4", "512" or "256MiB".

        Raises:
            BudgetError: an amount not above 0, a share above 1, or text that is no budget.
        """
        if isinstance(given, Keep):
            return given
        if isinstance(given, str):
            return _parse_text(given.strip())
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise BudgetError(f"keep={given!r} is not a budget; {_HINT}")
        try:
            amount = float(given)
        except OverflowError:
            amount = inf
        return _make("tokens" if isinstance(given, int) else "share", amount, given)

    def per_head(self, prompt: int, entry_bytes: int | float) -> float:
        """Entries per head for a prompt of so many tokens, before rounding.

        `entry_bytes` is what one more entry in every head of every layer costs.
        """
        if self.kind == "tokens":
            return self.amount
        return self.amount * prompt if self.kind == "share" else self.amount / entry_bytes

    def beside(self, taken: int) -> "Keep":
        """What is left for entries where so many bytes are taken by what goes with them."""
        return self if self.kind != "bytes" else Keep("bytes", max(1.0, self.amount - taken))

    def entries(self, prompt: int, protected: int, entry_bytes: int | float) -> int:
        """`per_head` as a whole number; a share or size is lifted to the least the method needs.

        Raises:
            BudgetError: a number of tokens that leaves no room beside the protected slots.
        """
        least = protected + 1
        whole = int(self.per_head(prompt, entry_bytes) + 1e-6)
        if self.kind == "tokens" and whole < least <= prompt:
            raise BudgetError(
                f"keep={whole} leaves nothing to choose: this method always keeps "
                f"{protected} entries (window and sinks). Use keep={least} or more, "
                "or a smaller window (--set window=8)"
            )
        return max(whole, least)

    def __str__(self) -> str:
        """Text that `parse` reads as exactly this budget, whatever the amount."""
        percent = f"{100 * self.amount:.6g}"
        if self.kind == "share" and "e" not in percent and float(percent) / 100 == self.amount:
            return f"{percent}%"
        whole = self.kind != "share" and self.amount == int(self.amount)
        number = str(int(self.amount)) if whole else f"{Decimal(repr(float(self.amount))):f}"
        return f"{number}B" if self.kind == "bytes" else number


def _parse_text(text: str) -> Keep:
    part = re.fullmatch(r"([0-9]{1,9})\s*/\s*([1-9][0-9]{0,8})", text)
    if part is not None:
        return _make("share", int(part[1]) / int(part[2]), text)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[KMG]?I?B)?", text, flags=re.IGNORECASE)
    if match is None:
        raise BudgetError(f"keep={text!r} is not a budget; {_HINT}")
    number, unit = float(match[1]), (match[2] or "").upper()
    if unit == "%":
        return _make("share", number / 100, text)
    if unit:
        return _make("bytes", number * _UNITS[unit], text)
    return _make("share" if "." in match[1] else "tokens", number, text)


def _make(kind: Literal["tokens", "share", "bytes"], amount: float, given: object) -> Keep:
    if amount == inf:
        raise BudgetError(f"keep is a number beyond all caches; {_HINT}")
    if not amount > 0:
        raise BudgetError(f"keep={given!r} keeps nothing; {_HINT}")
    if kind == "share" and amount > 1:
        raise BudgetError(f"keep={given!r} is more than the whole prompt; {_HINT}")
    return Keep(kind, amount)
