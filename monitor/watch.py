"""What is seen of a run: a board and the view of it, by the pipeline's kind."""

from __future__ import annotations

from brokers.pipeline import Pipeline
from monitor.live import LiveView
from monitor.results_view import ResultsView
from monitor.roll import Roll
from monitor.scoreboard import Scoreboard
from monitor.training_board import TrainingBoard
from monitor.training_view import TrainingView


def watch(pipeline: Pipeline, broker: str) -> tuple[Roll, LiveView]:
    """A board that hears of the pipeline's work, and the live view of it; `broker` is how the view names the broker."""
    if pipeline.trains:
        training = TrainingBoard(pipeline.name)
        return training, TrainingView(pipeline, broker, training)
    results = Scoreboard(pipeline.name)
    return results, ResultsView(pipeline, broker, results)
