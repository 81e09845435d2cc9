"""What /metrics and /metrics-summary tell, under clip-retrieval's names where it has one."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_STEPS = {
    "full_knn_request_time": "Time of an answered knn request, waiting included",
    "image_prepro_time": "Time to decode and resize a picture",
    "text_clip_inference_time": "Time to encode the texts of a batch",
    "image_clip_inference_time": "Time to encode the pictures of a batch",
    "knn_index_time": "Time to search the index for a batch, duplicates folded",
    "metadata_get_time": "Time to read the metadata of an answer",
}


class Metrics:
    """A registry of its own, so that two servers in a process do not mix.

    Args:
        waiting: tells how many questions wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.steps = {n: Histogram(n, text, registry=self._registry) for n, text in _STEPS.items()}
        self.requests = Counter(
            "http_requests", "Requests answered", ["path", "status"], registry=self._registry
        )
        self.batch = Histogram(
            "knn_batch_questions",
            "Questions answered together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        gauge = Gauge("knn_waiting_questions", "Questions that wait", registry=self._registry)
        gauge.set_function(waiting)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def summary(self) -> str:
        """For people: what a request's time goes to, the costliest step first."""
        rows = list[tuple[float, int, str]]()
        for name, step in self.steps.items():
            values = {s.name: s.value for metric in step.collect() for s in metric.samples}
            count = int(values[f"{name}_count"])
            rows.append((values[f"{name}_sum"] / max(count, 1), count, name))
        (average, requests, _), *steps = rows
        if not requests:
            return "No request yet, go do some\n"
        lines = [
            f"Among {requests} calls to the knn end point with an average latency of "
            f"{average:.4f}s per request, the step costs are (in order):",
            "",
            f"{'name':<28}{'calls':>8}{'average':>10}  description",
        ]
        for seconds, count, name in sorted(steps, reverse=True):
            lines.append(f"{name:<28}{count:>8}{seconds:>9.4f}s  {_STEPS[name]}")
        return "\n".join(lines) + "\n"
