"""What a server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
