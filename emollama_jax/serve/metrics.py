"""What a server counts, for Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # the time at which each figure began is of no use here

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one server; each server has its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU seconds, open files
        named = lambda kind, name, text, *labels, **more: kind(
            f"emollama_{name}", text, labels, registry=self.registry, **more
        )
        self.requests = named(Counter, "requests_total", "Requests that ended, by route and status", "route", "status")
        self.refusals = named(Counter, "refusals_total", "Requests without an answer, by cause", "cause")
        self.request_seconds = named(
            Histogram, "request_seconds", "From a request's head to the end of its answer", "route", buckets=SECONDS
        )
        self.stages = named(
            Histogram, "stage_seconds", "Work on a batch: read, encode, label, generate", "stage", buckets=SECONDS
        )
        self.first_token = named(Histogram, "first_token_seconds", "From a prompt to its first token", buckets=SECONDS)
        self.tokens = named(Counter, "tokens_total", "Tokens generated")
        self.clips = named(Counter, "clips_total", "Clips asked about: encoded, or cached", "source")
        self.cancelled = named(Counter, "cancelled_total", "Answers that were dropped as their client went away")
        self.in_flight = named(Gauge, "requests_in_flight", "Requests that were taken and are not answered")
        self.waiting = named(Gauge, "queue_waiting", "Requests that wait for the engine")
        self.busy_slots = named(Gauge, "slots_busy", "Answers under way")
        self.slots = named(Gauge, "slots", "Answers that can be under way")
        self.cache_bytes = named(Gauge, "cache_bytes", "Memory of clips kept for follow-up questions")
        self.ready = named(Gauge, "ready", "1 where /ready says 200")

    def stage(self, name: str, seconds: float) -> None:
        """Count a piece of work."""
        self.stages.labels(name).observe(seconds)

    def text(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        return generate_latest(self.registry)
