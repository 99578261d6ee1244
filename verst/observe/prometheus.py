"""A run's metrics for Prometheus: the newest value of each, and counters, over HTTP from the process that has them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

_OTHER = re.compile("[^a-zA-Z0-9_]")
_LAST = "last_report_timestamp_seconds"


class Endpoint(Collector):
    """`http://HOST:PORT/metrics`, until it is closed.

    Every metric of `docs/metrics.md` has the name `verst_` and its own with `_` for other signs, and the label `run`. A metric that the
    newest row lacks keeps its last value, so that what is measured every few steps is not missed between two scrapes.
    """

    def __init__(self, host: str, port: int, *, run: str, version: str) -> None:
        """`port` 0: the system chooses. Raises `OSError` if the address cannot be had."""
        self._run, self._version = run, version
        self._values: tuple[dict[str, float], dict[str, float]] = {}, {"steps": 0.0, "dropped_groups": 0.0, "failed_trajectories": 0.0}
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def report(self, metrics: Mapping[str, float], *, steps: int = 0, dropped: float = 0, failed: int = 0) -> None:
        """A new row, and what happened since the row before."""
        gauges, counters = self._values
        gauges = gauges | {_LAST: time.time()} | dict(metrics)
        added = {"steps": steps, "dropped_groups": dropped, "failed_trajectories": failed}
        # replaced whole: the server's threads never see half of a row
        self._values = gauges, {name: value + added[name] for name, value in counters.items()}

    def collect(self) -> Iterator[Metric]:
        """For the library, at each scrape."""
        info = InfoMetricFamily("verst_run", "The run, and the version of Verst.", labels=["run"])
        info.add_metric([self._run], {"version": self._version})
        yield info
        gauges, counters = self._values
        for name, value in counters.items():
            counter = CounterMetricFamily(f"verst_{name}", f"{name.replace('_', ' ')} since this process began", labels=["run"])
            counter.add_metric([self._run], value)
            yield counter
        for name, value in gauges.items():
            told = "Unix time of the newest report" if name == _LAST else f"{name}, see docs/metrics.md"
            gauge = GaugeMetricFamily(f"verst_{_OTHER.sub('_', name)}", told, labels=["run"])
            gauge.add_metric([self._run], value)
            yield gauge

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
