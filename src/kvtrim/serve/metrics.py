"""What a server counts, as Prometheus reads it."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from kvtrim.serve.request import Usage
from kvtrim.serve.scheduler import Scheduler

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self, scheduler: Scheduler):
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "kvtrim_requests", "Requests by endpoint and status.", ["path", "status"], registry=own
        )
        self.tokens = Counter("kvtrim_tokens", "Tokens by kind.", ["kind"], registry=own)
        self.first_token = Histogram(
            "kvtrim_first_token_seconds", "To the first token.", registry=own, buckets=_SECONDS
        )
        self.seconds = Histogram(
            "kvtrim_answer_seconds", "To the last token.", registry=own, buckets=_SECONDS
        )
        values = {
            "kvtrim_answering": ("Requests that decode now.", lambda: len(scheduler.answers)),
            "kvtrim_waiting": ("Requests in the queue.", lambda: len(scheduler.waiting)),
            "kvtrim_reading": ("Prompts being read.", lambda: len(scheduler.readings)),
            "kvtrim_held_bytes": ("Bytes of all caches.", lambda: scheduler.memory.held_bytes),
            "kvtrim_memory_bytes": ("The bound on them.", lambda: scheduler.memory.bound),
            "kvtrim_documents": ("In memory.", lambda: len(scheduler.memory.documents)),
        }
        for name, (what, value) in values.items():
            Gauge(name, what, registry=own).set_function(value)

    def count_answer(self, usage: Usage) -> None:
        """Count an answer."""
        self.tokens.labels("read").inc(usage.prompt_tokens - usage.reused_tokens)
        self.tokens.labels("reused").inc(usage.reused_tokens)
        self.tokens.labels("written").inc(usage.completion_tokens)
        self.first_token.observe(usage.first_token_s)
        self.seconds.observe(usage.seconds)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _Joined(Collector):
    """What several servers count, each under its name."""

    def __init__(self, pages: Mapping[str, bytes]):
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for name, page in self._pages.items():
            for own in text_string_to_metric_families(page.decode()):
                joined = Metric(own.name, own.documentation, own.type)
                joined = found.setdefault(own.name, joined)
                for each in own.samples:
                    joined.add_sample(each.name, {**each.labels, "replica": name}, each.value)
        yield from found.values()


def join_pages(own: CollectorRegistry, pages: Mapping[str, bytes]) -> bytes:
    """A front's own counters, and what each replica counts with its name as one more label."""
    joined = CollectorRegistry()
    joined.register(_Joined(pages))
    return generate_latest(own) + generate_latest(joined)


class Lines(logging.Formatter):
    """One JSON object a line; nothing of a request's texts is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as a line."""
        from json import dumps

        own: dict[str, Any] = getattr(record, "facts", {})
        line = {"time": round(time.time(), 3), "level": record.levelname.lower(), **own}
        if not own:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return dumps(line, ensure_ascii=True)


def log_to_stderr() -> None:
    """Send what kvtrim's server says to standard error, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    own = logging.getLogger("kvtrim.serve")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)
