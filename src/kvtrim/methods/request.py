"""A method and a budget as somebody asked for them, settled where they come in.

A command line and every public call turn words into a `Request` once. Whatever lies below takes it
as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtrim.errors import UsageError
from kvtrim.methods.keep import Keep
from kvtrim.methods.method import Method
from kvtrim.methods.settings import find


@dataclass(frozen=True)
class Request:
    """What to evict and how much of it."""

    named: str | Method  # the method as it was named
    settings: Mapping[str, Any]  # and its parameters, as they were given
    method: Method  # both together; not yet ready for any model
    keep: Keep

    @classmethod
    def of(
        cls,
        method: "str | Method | Request" = "auto",
        keep: int | float | str | Keep = 512,
        settings: Mapping[str, Any] | None = None,
    ) -> "Request":
        """A request in words, settled; one that is settled brings its own budget and parameters.

        Raises:
            UnknownNameError: no such method, preset or parameter.
            BudgetError: a `keep` out of range, or below what the method always keeps.
            UsageError: a value outside its range, values that do not go together, or a method
                that is none.
        """
        if isinstance(method, Request):
            if settings:
                raise UsageError(f"{next(iter(settings))} comes too late: the method is settled")
            return method
        if not isinstance(method, (str, Method)):
            raise UsageError(
                f"method={method!r:.60} is no name of kvtrim.METHODS and no Method; a budget is "
                'given as keep: kvtrim.Cache(model, "snapkv", keep=512)'
            )
        budget, given = Keep.parse(keep), dict(settings or {})
        found = find(method, **given)
        found.require_room(budget)
        return cls(method, given, found, budget)

    @property
    def name(self) -> str:
        """The method, for people to read."""
        return self.named if isinstance(self.named, str) else type(self.named.policy).__name__
