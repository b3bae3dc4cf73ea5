"""What a trainer may do for the whole pipeline beside its own part of the work."""

from __future__ import annotations

from brokers.protocol.messages import StepMessage
from brokers.protocol.training import TrainingStatus


class TrainingRole:
    """What a trainer does beside its own part of the work: nothing, here. See `stages.training.membership`."""

    async def open(self) -> None:
        """Begin to listen: the trainer has joined."""

    def on_step_message(self, word: StepMessage) -> None:
        """A word about a term, or about a step that is given up."""

    def tick(self) -> None:
        """A second has passed."""

    def extend_status(self, standing: TrainingStatus) -> TrainingStatus:
        """The trainer's record, with what this role has to say."""
        return standing
