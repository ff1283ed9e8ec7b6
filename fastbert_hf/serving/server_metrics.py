"""What a server counts of its work, in the words of Prometheus."""

from __future__ import annotations

import re

from .text_queue import Batch


try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client import disable_created_metrics as without_times
except ImportError as error:
    raise ImportError('the server needs its extra: pip install "fastbert-hf[ray]"') from error


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
SHARES = tuple(number / 10 for number in range(11))
COUNTS = tuple(2**number for number in range(14))


class ServerMetrics:
    """Counts. Names that begin with `te_` are those of Text Embeddings Inference."""

    def __init__(self):
        without_times()  # of creation, which would double the page, and nobody asks for them
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("te_request_count", "Requests.", ["method"], registry=registry)
        self.answered = Counter("te_request_success", "Requests that were answered.", ["method"], registry=registry)
        self.failed = Counter("te_request_failure", "Requests with an error, by status.", ["err"], registry=registry)
        self.shed = Counter("fastbert_shed", "Texts that were refused as more came than fits.", registry=registry)
        self.reloads = Counter("fastbert_reload_failure", "Settings that could not be used.", registry=registry)

        def seconds(name: str, of: str) -> Histogram:
            return Histogram(name, f"Seconds {of}.", buckets=SECONDS, registry=registry)

        self.duration = seconds("te_request_duration", "from a request to its answer")
        self.queueing = seconds("te_request_queue_duration", "that a text waited")
        self.inference = seconds("te_request_inference_duration", "of a batch")
        self.waiting = Gauge("te_queue_size", "Texts that wait.", registry=registry)
        self.waiting_tokens = Gauge("fastbert_queue_tokens", "Tokens that wait.", registry=registry)
        self.servers = Gauge("fastbert_servers", "Batches that are answered at a time.", registry=registry)
        self.batch_size = Histogram("te_batch_next_size", "Texts of a batch.", buckets=COUNTS, registry=registry)
        self.batch_tokens = Histogram("te_batch_next_tokens", "Tokens of a batch.", buckets=COUNTS, registry=registry)
        self.exits = Counter(
            "fastbert_exit_layer", "Texts, by the layer they left after.", ["layer"], registry=registry
        )
        self.speeds = Histogram("fastbert_speed", "Speed of a batch.", buckets=SHARES, registry=registry)

    def count(self, batch: Batch) -> None:
        """Count what was answered together."""
        self.inference.observe(batch.ended - batch.started)
        self.batch_size.observe(len(batch.texts))
        self.batch_tokens.observe(sum(answer.tokens for answer in batch.answers))
        self.speeds.observe(batch.speed)
        for text, answer in zip(batch.texts, batch.answers, strict=True):
            self.queueing.observe(batch.started - text.arrived)
            if answer.error is None:
                self.exits.labels(answer.exit_layer).inc()

    def text(self) -> bytes:
        """Return what `GET /metrics` says."""
        # Where this library ends the names of all counters alike, Text Embeddings Inference does not.
        return re.sub(rb"\b(te_\w+)_total\b", rb"\1", generate_latest(self.registry))
