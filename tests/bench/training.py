"""How fast a pipeline trains: `python -m tests.bench.training`.

VGG-11 with a small head on 32x32, in two stages of one thread, SGD with momentum, a batch in four micro-batches. Rows
(samples) a second of

* the slowest stage alone: its forwards, backwards and optimizer, in this process, with nothing else running;
* the ideal pipeline: both stages as fast as they are alone, and messages that take no time; it still has to be filled
  and drained in each step;
* the network in one piece, with the same micro-batches, alone in this process;
* `torch.distributed.pipelining` in two processes on gloo, by 1F1B and by GPipe: `torch` as it is installed, and `tuned`
  with the allocator settings of our workers, which it does not have by itself;
* ours: two workers and a source through Mosquitto (or the embedded broker), by both schedules.

All train the same parts on the same batches: a run in which their losses differ fails. A rate is that of the median
step. Each round goes through all of them, and the figures are the medians of the rounds. Ratios within one run are what
counts, on a quiet machine: neighbours take most from the pipelines, which need both cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from brokers.server.local_broker import BrokerKind
from brokers.server.mosquitto_conf import find_mosquitto as find_mosquitto
from tests.bench.training_peers.ideal_pipeline import ideal_step_s
from tests.bench.training_peers.job import TrainingJob
from tests.bench.training_peers.single_process import measure_stages_alone, unsplit_losses
from tests.bench.training_peers.sparse_pipeline import run_sparse_pipeline
from tests.bench.training_peers.torch_pipeline import run_torch_pipeline

CUTS = (6, 11)
SOLO_STEPS = 6
SWEEP = (16, 32, 64, 128, 256)
SWEEP_CUT = 11
# So many rows a line of the sweep is measured for: small batches need more steps.
SWEEP_ROWS = 512
# torch scales losses and gradients in another place, so that the last bits differ, and more of them each step.
TOLERANCE = 1e-3
COMPARED_STEPS = 3
RATIOS = {
    "of_slowest": "slowest",
    "of_ideal": "ideal",
    "of_unsplit": "unsplit",
    "of_torch": "torch",
    "of_tuned": "tuned",
}


def run_round(job: TrainingJob, kind: BrokerKind) -> dict[str, Any]:
    """Everything once: `rates` in rows a second by name, what a step takes the `stages`, and what each step took."""
    whole = replace(job, cuts=())
    stages, unsplit = measure_stages_alone(job, SOLO_STEPS), measure_stages_alone(whole, SOLO_STEPS)[0]
    rates = {
        "slowest": job.batch / max(stage.step_s(job.micro_batches) for stage in stages),
        "ideal": job.batch / min(ideal_step_s(stages, name, job.micro_batches) for name in job.schedules),
        "unsplit": job.batch / unsplit.step_s(job.micro_batches),
    }
    told: dict[str, Any] = {"alone": [stage.step_breakdown_ms(job.micro_batches) for stage in stages]}
    losses = {"unsplit": unsplit_losses(whole, COMPARED_STEPS)}
    found: dict[str, Any] = {}
    for whose, keeps in (("torch", False), ("tuned", True)):
        with tempfile.TemporaryDirectory() as folder:
            runs = run_torch_pipeline(replace(job, tune_malloc=keeps), Path(folder))
        found |= {f"{whose} {name}": run for name, run in runs.items()}
    for schedule in job.schedules:
        with tempfile.TemporaryDirectory() as folder:
            found[f"sparse {schedule}"] = run = run_sparse_pipeline(job, schedule, kind, Path(folder))
        told[f"sparse {schedule}"] = run["stages"]
    rates |= {name: job.batch / median(run["steps_s"]) for name, run in found.items()}
    _check({**losses, **{name: run["losses"] for name, run in found.items()}})
    return {"rates": rates, "stages": told, "steps_s": {name: run["steps_s"] for name, run in found.items()}}


def _check(losses: Mapping[str, Sequence[float]]) -> None:
    """Fail unless all have trained the same."""
    for name, found in losses.items():
        for step, (expected, actual) in enumerate(zip(losses["unsplit"], found, strict=False)):
            if not abs(expected - actual) <= TOLERANCE:
                raise SystemExit(f"step {step}: the loss of the unsplit network is {expected}, that of {name} {actual}")


def summarize_rounds(job: TrainingJob, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of the rounds, and how ours, by its better schedule, compares: medians of each round's ratios."""
    rates = {name: median(each["rates"][name] for each in rounds) for name in rounds[0]["rates"]}
    return {
        "cut": job.cuts[0],
        "batch": job.batch,
        "rates": rates,
        **{ratio: median(_ratio(each["rates"], other) for each in rounds) for ratio, other in RATIOS.items()},
        "rounds": list(rounds),
    }


def _ratio(rates: Mapping[str, float], other: str) -> float:
    return best_rate(rates, "sparse") / best_rate(rates, other)


def best_rate(rates: Mapping[str, float], whose: str) -> float:
    """The better one, where there are two of that name."""
    return max(rate for name, rate in rates.items() if name.startswith(whose))


# What it says ---------------------------------------------------------------------------------------------------------


def print_tables(title: str, rows: Sequence[Mapping[str, Any]], first: str) -> None:
    """The rates by cut or batch, and below them the ratios."""
    console = Console(width=110)
    rates = Table(title=f"{title}: rows a second")
    for column in (first, *rows[0]["rates"]):
        rates.add_column(column, justify="right")
    for row in rows:
        rates.add_row(str(row[first]), *(f"{rate:.1f}" for rate in row["rates"].values()))
    console.print(rates)
    compared = Table(title="ours, by its better schedule, as a share of")
    for column in (first, "slowest stage alone", "ideal pipeline", "unsplit", "torch", "torch, tuned"):
        compared.add_column(column, justify="right")
    for row in rows:
        compared.add_row(str(row[first]), *(f"{row[ratio]:.2f}" for ratio in RATIOS))
    console.print(compared)


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows a second over the size of the batch, for each contestant."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    batches = [row["batch"] for row in rows]
    bound = {"slowest": "slowest stage alone", "ideal": "ideal pipeline", "unsplit": "unsplit"}
    for name in rows[0]["rates"]:
        style = "--" if name in bound else "o-"
        axes.plot(batches, [row["rates"][name] for row in rows], style, label=bound.get(name, name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a batch, in four micro-batches")
    axes.set_ylabel("rows a second")
    axes.set_title(f"VGG-11, 32x32, cut after layer {rows[0]['cut']}")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="that count, of each contestant a round (default 10)")
    parser.add_argument("--rounds", type=int, default=2, help="through all contestants (default 2)")
    parser.add_argument("--cut", type=int, action="append", help="after so many layers; may be given twice (6 and 11)")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"batches of {SWEEP[0]} to {SWEEP[-1]} rows instead, at cut {SWEEP_CUT}; --steps is not heeded",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-training"), help="where the sweep's plot goes")
    parser.add_argument(
        "--broker", choices=["mosquitto", "embedded"], default="mosquitto" if find_mosquitto() else "embedded"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    cuts = options.cut or ([SWEEP_CUT] if options.sweep else CUTS)
    jobs = [TrainingJob((cut,), options.steps) for cut in cuts]
    title = f"VGG-11, 32x32, two stages of one thread, {options.broker}"
    if options.sweep:
        jobs = [replace(job, batch=batch, steps=max(4, SWEEP_ROWS // batch)) for job in jobs for batch in SWEEP]
    rounds: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for _ in range(options.rounds):
        for job, found in zip(jobs, rounds, strict=True):
            found.append(run_round(job, options.broker))
    rows = [summarize_rounds(job, found) for job, found in zip(jobs, rounds, strict=True)]
    print_tables(title, rows, "batch" if options.sweep else "cut")
    if options.sweep:
        options.out.mkdir(parents=True, exist_ok=True)
        plot_sweep(rows, options.out / "sweep.png")
        print(f"the plot is {options.out / 'sweep.png'}")
    if options.json:
        print(json.dumps({"broker": options.broker, "rows": rows}))


if __name__ == "__main__":
    main()
