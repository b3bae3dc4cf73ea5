"""Who trains what, from which version, and when that must be settled anew: the first stage's worker decides. Pure.

1. *Waiting* until every stage has a worker that is heard live. Of several, one is in the crew; the others stand by.
2. *Halting*: a new term begins. Each of the crew lets go of its step, and says which version it has in memory and which
   on disk.
3. *Restoring*: all go to the newest version that all have.
4. *Open*: sources may train, until one of the crew is lost, was cut off for a while, or leaves; until a source gives up
   its step, dies in the middle of it, or is not heard of for a lease. Then it begins again.

Terms only grow, and everything says to which it belongs: what a worker that was frozen still says changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_pool import LEASE_S
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from brokers.protocol.training import TrainingStatus

# What could not be settled is tried again so much later.
RETRY_DELAY_S = 2.0

CoordinatorPhase = Literal["waiting", "halting", "restoring", "open"]


@dataclass(frozen=True, slots=True)
class CoordinatorCommand:
    """What the crew is to do now: `quiesce`, or `restore` to a version."""

    verb: Literal["quiesce", "restore"]
    term: int
    members: dict[str, str]
    version: int = 0
    restored_term: int = 0  # memory counts as a version only of who was told so in this term


@dataclass(slots=True)
class _Candidate:
    birth: WorkerRecord
    heard_s: float
    alive: bool  # it has renewed its record since we listen: a retained one may have outlived its worker

    @property
    def standing(self) -> TrainingStatus:
        return self.birth.training or TrainingStatus()

    @property
    def life(self) -> tuple[str, int, int]:
        """What changes when messages to it may have been lost."""
        return self.birth.instance, self.birth.pid, self.standing.disconnects


@dataclass(slots=True, eq=False)
class Coordinator:
    """The crew of one pipeline, as the worker `own` of its first stage sees it. Times are monotonic seconds."""

    own_worker: str
    stages: tuple[str, ...]
    lease_s: float = LEASE_S
    phase: CoordinatorPhase = "waiting"
    term: int = 0
    problem: str = ""
    term_reason: str = "the pipeline begins"
    members: dict[str, str] = field(default_factory=dict)
    _candidates: dict[tuple[str, str], _Candidate] = field(default_factory=dict)  # (stage, worker)
    _lives: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # of the crew, as the term began
    _halted: dict[str, TrainingStatus] = field(default_factory=dict)  # by stage
    _restored: set[str] = field(default_factory=set)
    _again_s: float = 0.0  # not before
    _since_s: float = 0.0  # the term, or its restoring, began

    # Heard --------------------------------------------------------------------------------------------------------

    def on_presence(
        self, stage: str, worker: str, birth: WorkerRecord | None, now_s: float, *, retained: bool = False
    ) -> None:
        """A worker's record, or None when it is gone."""
        if birth is None or birth.state == "stopped" or birth.training is None:
            self._candidates.pop((stage, worker), None)
            return
        before = self._candidates.get((stage, worker))
        alive = not retained or (before is not None and before.alive)
        self._candidates[stage, worker] = _Candidate(birth, now_s, alive)

    def on_quiesced(self, stage: str, worker: str, term: int, standing: TrainingStatus) -> None:
        """One of the crew has let go of its step."""
        if self.phase == "halting" and term == self.term and self.members.get(stage) == worker:
            self._halted[stage] = standing

    def on_restored(self, stage: str, worker: str, term: int, now_s: float, problem: str = "") -> None:
        """One of the crew has the version, or why it cannot."""
        if self.phase == "restoring" and term == self.term and self.members.get(stage) == worker:
            if problem:
                self._stop(f"stage {stage!r}, worker {worker!r}: {problem}", now_s)
            else:
                self._restored.add(stage)

    def end_term(self, why: str) -> None:
        """The step in hand, or the connection, is lost: settle it anew."""
        if self.phase != "waiting":
            self.phase, self.term_reason = "waiting", why

    # Who leads ----------------------------------------------------------------------------------------------------

    def is_leader(self, now_s: float, *, was_leader: bool) -> bool:
        """Whether this worker is the one of the first stage that conducts; `leading`: it has done so until now."""
        self._forget_silent(now_s)
        others = [
            member
            for (stage, worker), member in self._candidates.items()
            if stage == self.stages[0] and worker != self.own_worker
        ]
        # One that is leaving leads until it has gone: it finishes its step.
        rivals = [member for member in others if member.birth.state != "standby"]
        if was_leader:
            return all((member.standing.term, member.birth.worker) < (self.term, self.own_worker) for member in rivals)
        return not rivals and all(self.own_worker < member.birth.worker for member in others)

    # Decide -------------------------------------------------------------------------------------------------------

    def next_command(self, now_s: float, unix_ms: int) -> CoordinatorCommand | None:
        """What the crew is to do, if that has changed; to be asked after whatever was heard, and each second."""
        self._forget_silent(now_s)
        if self.phase in ("halting", "restoring") and now_s - self._since_s > self.lease_s:
            self.end_term(f"not all stages have answered within {self.lease_s:g} s")
        if self.phase != "waiting" and (trouble := self._trouble()):
            self.end_term(trouble)
        match self.phase:
            case "waiting" if now_s >= self._again_s:
                return self._begin(now_s, unix_ms)
            case "halting" if len(self._halted) == len(self.stages):
                return self._restore(now_s)
            case "restoring" if len(self._restored) == len(self.stages):
                self.phase, self.problem = "open", ""
        return None

    def _forget_silent(self, now_s: float) -> None:
        for key, member in list(self._candidates.items()):
            if now_s - member.heard_s > PRESENCE_TIMEOUT_S and key != (self.stages[0], self.own_worker):
                del self._candidates[key]

    def _trouble(self) -> str:
        for stage, worker in self.members.items():
            member = self._candidates.get((stage, worker))
            if member is None:
                return f"worker {worker} of stage {stage} is gone"
            if member.life != self._lives[stage]:
                same = member.life[:2] == self._lives[stage][:2]
                return f"worker {worker} of stage {stage} {'was cut off for a while' if same else 'began anew'}"
        return ""

    def _begin(self, now_s: float, unix_ms: int) -> CoordinatorCommand | None:
        crew: dict[str, str] = {}
        for stage in self.stages:
            fitting = [
                member
                for (name, _), member in self._candidates.items()
                if name == stage and member.alive and member.birth.state in ("up", "standby")
            ]
            if stage == self.stages[0]:
                fitting = [member for member in fitting if member.birth.worker == self.own_worker]
            if not fitting:
                return None
            crew[stage] = max(fitting, key=lambda member: self._fitness(stage, member)).birth.worker
        known = [member.standing.term for member in self._candidates.values()]
        self.term = max(unix_ms, self.term + 1, *(term + 1 for term in known))
        self.members, self.phase, self._since_s = crew, "halting", now_s
        self._lives = {stage: self._candidates[stage, worker].life for stage, worker in crew.items()}
        self._halted.clear()
        self._restored.clear()
        return CoordinatorCommand("quiesce", self.term, dict(crew))

    def _fitness(self, stage: str, member: _Candidate) -> tuple[object, ...]:
        """Who was in the crew stays there; else who has the newest version; else the first by name."""
        standing = member.standing
        newest = max(standing.checkpoints, default=0)
        name = tuple(-ord(letter) for letter in member.birth.worker)
        return self.members.get(stage) == member.birth.worker, newest, name

    def _restore(self, now_s: float) -> CoordinatorCommand | None:
        found = {stage: {0, *standing.checkpoints} for stage, standing in self._halted.items()}
        # Who missed a term may have in memory what the others have given up, and done otherwise since.
        latest = max(standing.restored_term for standing in self._halted.values())
        for stage, standing in self._halted.items():
            if standing.version is not None and standing.restored_term == latest:
                found[stage].add(standing.version)
        version = max(set.intersection(*found.values()))
        for stage, standing in self._halted.items():
            # With two checkpoints here, every stage has written the older one: whoever lacks it has lost it.
            if len(standing.checkpoints) > 1 and version < standing.checkpoints[-2]:
                lacking = ", ".join(
                    f"stage {other!r} has {_numbers(self._halted[other].checkpoints)}"
                    for other in self.stages
                    if standing.checkpoints[-2] not in found[other]
                )
                self._stop(
                    f"no version is on all stages: stage {stage!r} has checkpoints of {_numbers(standing.checkpoints)}, "
                    f"{lacking}; "
                    "start that stage where its checkpoints are, or move all of them away to begin anew",
                    now_s,
                )
                return None
        self.phase, self._since_s = "restoring", now_s
        return CoordinatorCommand("restore", self.term, dict(self.members), version, latest)

    def _stop(self, problem: str, now_s: float) -> None:
        """Nothing can be trained until something changes; the sources are told."""
        self.phase, self.problem, self.term_reason = "waiting", problem, problem
        self._again_s = now_s + RETRY_DELAY_S


def _numbers(versions: tuple[int, ...]) -> str:
    return " and ".join(map(str, versions)) or "none"
