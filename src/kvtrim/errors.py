"""What can go wrong, as one tree. Every message says what was wrong and what to do instead.

KvtrimError
├── UsageError (also a ValueError)      a wrong argument
│   ├── BudgetError                     a `keep` that cannot be met
│   └── UnknownNameError                a method, preset or parameter nobody has; names the nearest
├── ModelError                          a model that cannot be loaded or attached
│   ├── UnsupportedModelError           an architecture kvtrim was never tested on
│   └── NotAttachedError                a kvtrim cache used on a model without `kvtrim.attach`
├── FileError (also an OSError)         a file that cannot be read or written, or is damaged
└── CacheError                          a cache that cannot do what was asked
    └── CacheFileError                  a saved cache that is damaged or belongs to another model
"""

from collections.abc import Iterable
from difflib import get_close_matches


class KvtrimError(Exception):
    """Base of every error that kvtrim raises on purpose."""


class UsageError(KvtrimError, ValueError):
    """An argument has a value that cannot work."""


class BudgetError(UsageError):
    """`keep` is out of range, or smaller than what the method always keeps."""


class UnknownNameError(UsageError):
    """A name that is not in a table."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        names = sorted(known)
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}Known: {', '.join(names)}")


class ModelError(KvtrimError):
    """A model could not be loaded, or lacks something kvtrim needs."""


class UnsupportedModelError(ModelError):
    """The architecture is not among those that kvtrim is tested on."""


class NotAttachedError(ModelError):
    """A kvtrim cache reached a model that kvtrim is not attached to."""


class FileError(KvtrimError, OSError):
    """A file that cannot be read or written: no room, no permission, damaged, not a file.

    Args:
        doing: "read" or "write".
        path: of the file.
        reason: what the system said, or what is wrong with it.
    """

    def __init__(self, doing: str, path: object, reason: OSError | str):
        super().__init__()
        if isinstance(reason, OSError):
            self.errno, self.strerror = reason.errno, reason.strerror or str(reason)
        else:
            self.strerror = reason
        self.doing, self.path = doing, path
        self.message = f"cannot {doing} {path}: {self.strerror}"

    def with_remedy(self, remedy: str) -> "FileError":
        """The same with what to do about it."""
        other = FileError(self.doing, self.path, f"{self.strerror}; {remedy}")
        other.errno = self.errno
        return other

    def __str__(self) -> str:
        return self.message


class CacheError(KvtrimError):
    """A cache is in a state that does not allow what was asked."""


class CacheFileError(CacheError):
    """A saved cache cannot be read, was changed, or belongs to another model."""
