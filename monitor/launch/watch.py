"""What is seen of a run: a board and the view of it, by the pipeline's kind."""

from __future__ import annotations

from brokers.config.pipeline_file import Pipeline
from monitor.presence.inference_stats import Scoreboard
from monitor.presence.presence_table import Roll
from monitor.presence.training_stats import TrainingBoard
from monitor.terminal.inference_view import ResultsView
from monitor.terminal.live import LiveView
from monitor.terminal.training_view import TrainingView


def watch(pipeline: Pipeline, broker: str) -> tuple[Roll, LiveView]:
    """A board that hears of the pipeline's work, and the live view of it; `broker` is how the view names the broker."""
    if pipeline.trains:
        training = TrainingBoard(pipeline.name)
        return training, TrainingView(pipeline, broker, training)
    results = Scoreboard(pipeline.name)
    return results, ResultsView(pipeline, broker, results)
