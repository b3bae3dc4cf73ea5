"""What is seen of a run: a board and the view of it, by the pipeline's kind."""

from __future__ import annotations

from brokers.config.pipeline_file import Pipeline
from monitor.presence.inference_stats import InferenceStats
from monitor.presence.presence_table import PresenceTable
from monitor.presence.training_stats import TrainingStats
from monitor.terminal.inference_view import InferenceView
from monitor.terminal.live import LiveView
from monitor.terminal.training_view import TrainingView


def create_live_view(pipeline: Pipeline, broker: str) -> tuple[PresenceTable, LiveView]:
    """A board that hears of the pipeline's work, and the live view of it; `broker` is how the view names the broker."""
    if pipeline.is_training:
        training = TrainingStats(pipeline.name)
        return training, TrainingView(pipeline, broker, training)
    results = InferenceStats(pipeline.name)
    return results, InferenceView(pipeline, broker, results)
