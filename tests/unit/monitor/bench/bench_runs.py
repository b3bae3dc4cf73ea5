"""Results of runs for the tests of benchmarks."""

from __future__ import annotations

from monitor.analysis.run_metrics import LinkBytes, RunMetrics, StageTime
from monitor.bench.results import RunResult


def make_metrics(
    throughput: float, p50: float = 100.0, kind: str = "inference", energy: dict[str, float] | None = None
) -> RunMetrics:
    return RunMetrics(
        kind="training" if kind == "training" else "inference",
        samples=25,
        warm_up=5,
        failed=0,
        retries=1,
        span_s=25 / throughput,
        throughput_per_s=throughput,
        latency_ms={"mean": p50 + 1, "p50": p50, "p95": p50 + 20, "p99": p50 + 30},
        network_ms=None if kind == "training" else 12.34567,
        stages={"head": StageTime(1.0, 2.0, 3.0, 4.0)},
        links={"device - cloud": LinkBytes(1000.0, 24.0)},
        cpu_s={"stage": 0.25, "source": 0.005},
        energy_j=energy,
        energy_missing_reason="" if energy else "rapl: only root may read it",
    )


def make_results(**throughputs: list[float]) -> list[RunResult]:
    """The results of cases with the throughputs of their runs."""
    return [
        RunResult(case, f"{case}-{number}", make_metrics(throughput))
        for case, runs in throughputs.items()
        for number, throughput in enumerate(runs)
    ]
