"""What a trainer may do for the whole pipeline beside its own part of the work."""

from __future__ import annotations

from brokers.protocol.messages import Step
from brokers.protocol.training import Standing


class Role:
    """What a trainer does beside its own part of the work: nothing, here. See `stages.training.membership`."""

    async def open(self) -> None:
        """Begin to listen: the trainer has joined."""

    def heard(self, word: Step) -> None:
        """A word about a term, or about a step that is given up."""

    def look(self) -> None:
        """A second has passed."""

    def announce(self, standing: Standing) -> Standing:
        """The trainer's record, with what this role has to say."""
        return standing
