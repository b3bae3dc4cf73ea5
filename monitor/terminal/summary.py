"""The summary at the end of a run: results or steps, speed, and mean times by stage."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from brokers.protocol.stage_timing import STAGE_DURATIONS
from monitor.presence.inference_stats import format_counts

_TRAINING_DURATIONS = ("queue_ms", "decode_ms", "forward_ms", "backward_ms", "update_ms", "encode_ms")


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the summary of an inference or training run (summary.json) to standard output."""
    console = console or Console(soft_wrap=True, highlight=False)
    console.print()
    if "steps" in summary:
        _print_training(console, summary)
    else:
        _print_inference(console, summary)
    for error, count in summary["failures"].items():
        console.print(f"  [red]{count} x {error}[/]", markup=True)
    if summary["stages"]:
        console.print(_stages_table(summary))
    for link in summary.get("links", ()):
        console.print(_format_link(link))
    for kind, name in summary["files"].items():
        if name:
            console.print(f"  {kind:<9} {summary['outputs']}/{_format_files(name)}")


def _print_inference(console: Console, summary: Mapping[str, Any]) -> None:
    latencies = ", ".join(f"{name} {value:.0f}" for name, value in summary["latency_ms"].items()) or "none"
    console.print(
        f"[bold]{summary['results']}[/] results of {summary['requests']} requests in {summary['elapsed_s']:.1f} s: "
        f"[bold green]{summary['throughput_per_s']:.1f}/s[/], latency {latencies} ms"
    )
    counts = []
    for name in ("lost", "dropped", "failed", "retries"):
        reasons = format_counts(summary.get(f"{name}_by_reason", {}))
        counts.append(f"{name} {summary[name]}" + (f" ({reasons})" if reasons else ""))
    console.print(", ".join(counts))
    if count := summary["unreadable"]:
        console.print(f"[yellow]{count} samples could not be read; logs/source.log names them[/]")


def _print_training(console: Console, summary: Mapping[str, Any]) -> None:
    durations = ", ".join(f"{name} {value:.0f}" for name, value in summary["step_ms"].items()) or "none"
    console.print(
        f"[bold]{summary['steps']}[/] steps, {_plural(summary['epochs'], 'epoch')}, in {summary['elapsed_s']:.1f} s: "
        f"[bold green]{summary['throughput_per_s']:.0f} rows/s[/], step {durations} ms"
    )
    for data, loss, accuracy in (("training", "loss", "accuracy"), ("test", "test_loss", "test_accuracy")):
        if summary[loss] is not None:
            console.print(f"{data:<8} loss [bold]{summary[loss]:.4g}[/]{_format_accuracy(summary, accuracy)}")
    if rollbacks := summary["rollbacks"]:
        repeated = _plural(summary["repeated_steps"], "step")
        console.print(f"[yellow]{_plural(rollbacks, 'rollback')} to a checkpoint, {repeated} repeated[/]")


def _format_accuracy(summary: Mapping[str, Any], key: str) -> str:
    """`, accuracy 97.8% (best 98.1%)`, or nothing for a loss without accuracy."""
    if summary[key] is None:
        return ""
    best = summary.get(f"best_{key}")
    suffix = f" (best {best:.1%})" if best is not None and best > summary[key] else ""
    return f", accuracy [bold]{summary[key]:.1%}[/]{suffix}"


def _format_link(link: Mapping[str, Any]) -> str:
    """Delay, rate and traffic of a link between two sites."""
    rate = f", {link['rate_mbit']:g} Mbit/s" if link["rate_mbit"] else ""
    sent, received = (f"{link[key] / 1e6:.1f} MB" for key in ("bytes_out", "bytes_in"))
    return f"  link {link['site']} - {link['to']} ({link['delay_ms']:g} ms{rate}): {sent} sent, {received} received"


def _format_files(name: str | list[str]) -> str:
    """One file by its name; several by their common folder, or by their names."""
    if isinstance(name, str):
        return name
    folders = {each.rpartition("/")[0] for each in name}
    return f"{folders.pop()}/" if len(folders) == 1 and "" not in folders else ", ".join(name)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _stages_table(summary: Mapping[str, Any]) -> Table:
    is_training = "steps" in summary
    table = Table(box=None, padding=(0, 1 if is_training else 2, 0, 0), header_style="dim", title_justify="left")
    table.title = f"mean time of a {'micro-batch' if is_training else 'task'}, in ms"
    table.add_column("stage")
    keys = _TRAINING_DURATIONS if is_training else STAGE_DURATIONS
    counts = ("workers",) if is_training else ("workers", "tasks")  # all stages of a training run have equal tasks
    for column in (*counts, *(key.removesuffix("_ms") for key in keys), "MB in", "MB out"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stage in summary["stages"].items():
        durations = (f"{_duration_ms(stage, key):.1f}" for key in keys)
        megabytes = (f"{stage[key] / 1e6:.1f}" for key in ("bytes_in", "bytes_out"))
        table.add_row(name, *(str(stage[count]) for count in counts), *durations, *megabytes)
    return table


def _duration_ms(stage: Mapping[str, Any], key: str) -> float:
    """A mean duration of a stage; the optimizer's is the compute time without forward and backward."""
    if key != "update_ms":
        return float(stage[key])
    return max(0.0, float(stage["compute_ms"] - stage["forward_ms"] - stage["backward_ms"]))
