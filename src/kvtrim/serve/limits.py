"""What a server takes on, and what it does where a request does not say otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    memory: int = 8 << 30  # bytes of all caches
    batch: int = 32  # requests that decode together
    queue: int = 64  # requests that wait
    uploads: int = 8  # documents that wait to be read


@dataclass(frozen=True)
class Defaults:
    """What a server does where a request does not say otherwise."""

    method: str = "auto"
    keep: str = "25%"
    compress_above: int = 2048  # tokens of a first message; shorter ones are held whole
    deadline_s: float = 600.0
