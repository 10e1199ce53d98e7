"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Meters:
    """Counters of one engine, in a registry of their own."""

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        of = {"registry": self.registry, "namespace": "if_jax"}
        self._queue = Gauge("queue_pictures", "Pictures that wait", **of)
        self._batches = Histogram("batch_pictures", "Pictures drawn in one program", buckets=(1, 2, 4, 8, 16, 32), **of)
        self._stages = Histogram("stage_seconds", "Seconds of one batch in a stage", ["stage"], buckets=_SECONDS, **of)
        self._pictures = Counter("pictures", "Pictures by how their job ended", ["state"], **of)
        self._refusals = Counter("refusals", "Requests that were refused, by status", ["status"], **of)
        self._average = 1.0  # seconds a picture, of late

    def batch(self, pictures: int, seconds: float) -> None:
        """A batch was drawn."""
        self._batches.observe(pictures)
        self._average += 0.2 * (seconds / pictures - self._average)

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a batch was drawn."""
        self._stages.labels(name).observe(seconds)

    def ended(self, state: str, pictures: int) -> None:
        """A job has ended."""
        self._pictures.labels(state).inc(pictures)

    def refused(self, status: int) -> None:
        """A request was refused."""
        self._refusals.labels(str(status)).inc()

    def seconds_of_picture(self) -> float:
        """What a picture has taken of late."""
        return self._average

    def text(self, waiting: int) -> bytes:
        """All of it, as Prometheus reads it."""
        self._queue.set(waiting)
        return generate_latest(self.registry)
