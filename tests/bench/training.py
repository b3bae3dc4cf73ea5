"""Training throughput: pipelines of two stages compared with their bounds and with PyTorch's own pipelining.

    python -m tests.bench.training

VGG-11 with a small head on 32x32, two stages of one thread, SGD with momentum, a batch in four micro-batches. Rows
(samples) a second of

* slowest: the slowest stage alone in this process, forwards, backwards and optimizer;
* ideal: a pipeline whose stages are as fast as they are alone and whose messages take no time; it is filled and drained
  in each step;
* unsplit: the whole network with the same micro-batches, alone in this process;
* torch: `torch.distributed.pipelining` in two processes on gloo, as it is installed, by 1F1B and by GPipe; tuned: the
  same with the allocator settings of our workers;
* sparse: two workers and a source through a broker, by both schedules.

All train the same parts on the same batches: a run in which their losses differ fails. A rate is that of the median
step, the figures are medians over rounds of all implementations. Compare ratios of one run on a quiet machine: other
load slows the pipelines most, because they need both cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from brokers.server.local_broker import BrokerKind
from tests.bench.harness.output import add_broker_option, make_parser, print_json, print_table
from tests.bench.training_peers.ideal_pipeline import ideal_step_s
from tests.bench.training_peers.job import TrainingJob
from tests.bench.training_peers.single_process import measure_stages_alone, unsplit_losses
from tests.bench.training_peers.sparse_pipeline import run_sparse_pipeline
from tests.bench.training_peers.torch_pipeline import run_torch_pipeline

CUTS = (6, 11)
SOLO_STEPS = 6
SWEEP_BATCHES = (16, 32, 64, 128, 256)
SWEEP_CUT = 11
SWEEP_ROWS = 512  # measured for each batch size: small batches need more steps
# PyTorch scales losses and gradients at another place, so the last bits differ, and more of them after each step.
LOSS_TOLERANCE = 1e-3
COMPARED_STEPS = 3
# Key of a ratio -> implementation that our better schedule is compared with.
RATIOS = {
    "of_slowest": "slowest",
    "of_ideal": "ideal",
    "of_unsplit": "unsplit",
    "of_torch": "torch",
    "of_tuned": "tuned",
}


def run_round(job: TrainingJob, kind: BrokerKind) -> dict[str, Any]:
    """Measure all implementations once.

    Returns `rates` in rows a second by implementation, `stages`, the milliseconds of a step by stage, and `steps_s`.
    """
    whole = replace(job, cuts=())
    stages_alone = measure_stages_alone(job, SOLO_STEPS)
    unsplit = measure_stages_alone(whole, SOLO_STEPS)[0]
    rates = {
        "slowest": job.batch / max(stage.step_s(job.micro_batches) for stage in stages_alone),
        "ideal": job.batch / min(ideal_step_s(stages_alone, name, job.micro_batches) for name in job.schedules),
        "unsplit": job.batch / unsplit.step_s(job.micro_batches),
    }
    stages: dict[str, Any] = {"alone": [stage.step_breakdown_ms(job.micro_batches) for stage in stages_alone]}
    runs: dict[str, Any] = {}
    for implementation, tune_malloc in (("torch", False), ("tuned", True)):
        with tempfile.TemporaryDirectory() as folder:
            results = run_torch_pipeline(replace(job, tune_malloc=tune_malloc), Path(folder))
        runs |= {f"{implementation} {schedule}": run for schedule, run in results.items()}
    for schedule in job.schedules:
        with tempfile.TemporaryDirectory() as folder:
            run = run_sparse_pipeline(job, schedule, kind, Path(folder))
        runs[f"sparse {schedule}"] = run
        stages[f"sparse {schedule}"] = run["stages"]
    rates |= {name: job.batch / median(run["steps_s"]) for name, run in runs.items()}
    _check_losses(unsplit_losses(whole, COMPARED_STEPS), {name: run["losses"] for name, run in runs.items()})
    return {"rates": rates, "stages": stages, "steps_s": {name: run["steps_s"] for name, run in runs.items()}}


def _check_losses(expected: Sequence[float], losses: Mapping[str, Sequence[float]]) -> None:
    """Exit unless all implementations have trained the same."""
    for name, actual in losses.items():
        for step, (expected_loss, loss) in enumerate(zip(expected, actual, strict=False)):
            if not abs(expected_loss - loss) <= LOSS_TOLERANCE:
                raise SystemExit(
                    f"step {step}: the loss of the unsplit network is {expected_loss}, that of {name} {loss}"
                )


def summarize_rounds(job: TrainingJob, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of the rates and of each round's ratios."""
    return {
        "cut": job.cuts[0],
        "batch": job.batch,
        "rates": {name: median(each["rates"][name] for each in rounds) for name in rounds[0]["rates"]},
        **{ratio: median(_ratio(each["rates"], other) for each in rounds) for ratio, other in RATIOS.items()},
        "rounds": list(rounds),
    }


def _ratio(rates: Mapping[str, float], other: str) -> float:
    return best_rate(rates, "sparse") / best_rate(rates, other)


def best_rate(rates: Mapping[str, float], implementation: str) -> float:
    """The rate of an implementation, of its better schedule if it has two."""
    return max(rate for name, rate in rates.items() if name.startswith(implementation))


def print_tables(title: str, rows: Sequence[Mapping[str, Any]], first: str) -> None:
    """Print the rates by cut or batch, and the ratios."""
    names = rows[0]["rates"]
    columns = {first: (first, ""), **{name: (name, ".1f") for name in names}}
    print_table(f"{title}: rows a second", columns, [{first: row[first], **row["rates"]} for row in rows])
    columns = {first: (first, ""), **{other: (ratio, ".2f") for ratio, other in RATIOS.items()}}
    print_table("sparse, by its better schedule, as a share of", columns, rows)


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot rows a second over the batch size, for each implementation."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    batches = [row["batch"] for row in rows]
    bounds = {"slowest": "slowest stage alone", "ideal": "ideal pipeline", "unsplit": "unsplit"}
    for name in rows[0]["rates"]:
        style = "--" if name in bounds else "o-"
        axes.plot(batches, [row["rates"][name] for row in rows], style, label=bounds.get(name, name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a batch, in four micro-batches")
    axes.set_ylabel("rows a second")
    axes.set_title(f"VGG-11, 32x32, cut after layer {rows[0]['cut']}")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="measured, of each implementation a round (default 10)")
    parser.add_argument("--rounds", type=int, default=2, help="of all implementations (default 2)")
    parser.add_argument("--cut", type=int, action="append", help="after this layer; may be repeated (default 6 and 11)")
    sweep_help = (
        f"batches of {SWEEP_BATCHES[0]} to {SWEEP_BATCHES[-1]} rows at cut {SWEEP_CUT} instead; ignores --steps"
    )
    parser.add_argument("--sweep", action="store_true", help=sweep_help)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-training"), help="folder of the sweep's plot")
    add_broker_option(parser)
    options = parser.parse_args()
    cuts = options.cut or ([SWEEP_CUT] if options.sweep else CUTS)
    jobs = [TrainingJob((cut,), options.steps) for cut in cuts]
    if options.sweep:
        jobs = [replace(job, batch=batch, steps=max(4, SWEEP_ROWS // batch)) for job in jobs for batch in SWEEP_BATCHES]
    rounds: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for _ in range(options.rounds):
        for job, results in zip(jobs, rounds, strict=True):
            results.append(run_round(job, options.broker))
    rows = [summarize_rounds(job, results) for job, results in zip(jobs, rounds, strict=True)]
    title = f"VGG-11, 32x32, two stages of one thread, {options.broker}"
    print_tables(title, rows, "batch" if options.sweep else "cut")
    if options.sweep:
        options.out.mkdir(parents=True, exist_ok=True)
        plot_sweep(rows, options.out / "sweep.png")
        print(f"plot: {options.out / 'sweep.png'}")
    print_json(options, {"broker": options.broker, "rows": rows})


if __name__ == "__main__":
    main()
