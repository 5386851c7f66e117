"""What a server counts, for Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .manager import DSparkBatchingManager
from .request import RequestOutput

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server."""

    def __init__(self, manager: DSparkBatchingManager):
        self.registry = CollectorRegistry()
        gauges = {
            "running_requests": ("Requests that are being decoded.", lambda: manager.num_running),
            "waiting_requests": ("Requests that wait for a slot.", lambda: manager.num_waiting),
            "tau": ("Tokens a round of a request, bonus included, of all that have ended.", lambda: self._per_round(1)),
            "verified_length": ("Drafts verified a round of a request.", lambda: self._per_round(0)),
        }
        for name, (help, read) in gauges.items():
            Gauge(f"dspark_{name}", help, registry=self.registry).set_function(read)
        names = ("prompt_tokens", "generated_tokens", "rounds", "drafted_tokens", "verified_tokens", "accepted_tokens")
        self.counters = {
            name: Counter(f"dspark_{name}", f"{name.replace('_', ' ').capitalize()}.", registry=self.registry)
            for name in names
        }
        self.requests = Counter("dspark_requests", "Requests by how they ended.", ["end"], registry=self.registry)
        self.first = Histogram(
            "dspark_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "dspark_request_seconds", "From a request to its end.", buckets=SECONDS, registry=self.registry
        )
        # Beside the counters, as a gauge that reads the registry while it is read would read itself.
        self.totals = dict.fromkeys(names, 0)

    def begun(self, output: RequestOutput) -> None:
        """A request has its first tokens."""
        self.first.observe(time.perf_counter() - output.created_time)

    def ended(self, output: RequestOutput, how: str) -> None:
        """A request is over."""
        counts = {
            "prompt_tokens": len(output.prompt_ids),
            "generated_tokens": len(output.generated_tokens),
            "rounds": output.rounds,
            "drafted_tokens": output.drafted,
            "verified_tokens": output.verified,
            "accepted_tokens": output.accepted,
        }
        for name, count in counts.items():
            self.counters[name].inc(count)
            self.totals[name] += count
        self.requests.labels(how).inc()
        self.whole.observe(time.perf_counter() - output.created_time)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def _per_round(self, bonus: int) -> float:
        rounds = self.totals["rounds"]
        if not rounds:
            return 0.0
        return bonus + self.totals["accepted_tokens" if bonus else "verified_tokens"] / rounds
