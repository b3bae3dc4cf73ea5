"""The coordinator of a training pipeline: decides which workers train, from which version, and when to start over.

Every worker of the first stage runs a coordinator; one of them leads. A leader works in terms (as in Raft). In each
term the same workers train:

1. *waiting* until every stage has a live worker. One worker of each stage becomes a member, the others stand by.
2. *quiescing*: a new term begins. Each member discards its step and reports its versions, in memory and on disk.
3. *restoring*: all members go to the newest version that all of them have.
4. *training*: sources may train, until a member is lost, was disconnected or leaves, or until a source aborts its step,
   is lost in the middle of it, or makes no progress for a lease. Then it starts over.

Term numbers only grow, and every message carries its term, so messages of a worker that was frozen have no effect.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from brokers.dispatch.presence import WorkerRecord
from brokers.protocol.training import TrainingStatus

log = logging.getLogger(__name__)

# Delay before the next term when no common version was found or a member could not restore it.
RETRY_DELAY_S = 2.0
# Workers renew their records each second: after this time all live ones are known.
LISTEN_S = 1.3
# `tick` is called each second. After such a gap this process was frozen. Half of PRESENCE_TIMEOUT_S, after which the
# others elect another leader.
FROZEN_S = 5.0
_TEXT_MAX_CHARS = 400  # of a text in `TrainingStatus`

CoordinatorPhase = Literal["waiting", "quiescing", "restoring", "training"]
# Identifies a process and its connection; when it changes, messages to the worker may have been lost.
_ProcessKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class CoordinatorCommand:
    """A command to all members: `quiesce`, or `restore` a version.

    Memory counts as a version only at members that were restored in `restored_term`.
    """

    verb: Literal["quiesce", "restore"]
    term: int
    members: dict[str, str]
    version: int = 0
    restored_term: int = 0


@dataclass(slots=True)
class _Candidate:
    record: WorkerRecord
    is_live: bool  # False for a retained record, which may have outlived its worker

    @property
    def status(self) -> TrainingStatus:
        return self.record.training or TrainingStatus()

    @property
    def process_key(self) -> _ProcessKey:
        return self.record.instance, self.record.pid, self.status.disconnects


@dataclass(slots=True, eq=False)
class Coordinator:
    """The coordinator in worker `own_worker` of the first of `stages`. Times are monotonic seconds.

    `members` maps stages to workers, `term_reason` says why the current term began, `problem` why none can.
    """

    own_worker: str
    stages: tuple[str, ...]
    lease_s: float
    is_leader: bool = False
    phase: CoordinatorPhase = "waiting"
    term: int = 0
    problem: str = ""
    term_reason: str = "the pipeline begins"
    members: dict[str, str] = field(default_factory=dict)
    _candidates: dict[tuple[str, str], _Candidate] = field(default_factory=dict)  # by stage and worker
    _process_keys: dict[str, _ProcessKey] = field(default_factory=dict)  # of the members when the term began
    _quiesced: dict[str, TrainingStatus] = field(default_factory=dict)  # by stage
    _restored: set[str] = field(default_factory=set)  # stages
    _last_tick_s: float = float("-inf")
    _listen_until_s: float = 0.0
    _retry_s: float = 0.0  # no new term before this
    _phase_begin_s: float = 0.0
    _progress_s: float = 0.0  # the last progress of a step

    def on_worker(self, record: WorkerRecord, *, is_live: bool = True) -> None:
        """A worker has published its presence record; `is_live` is False for a retained one."""
        key = (record.stage, record.worker)
        if record.state == "stopped" or record.training is None:
            self._candidates.pop(key, None)
        else:
            self._candidates[key] = _Candidate(record, is_live)

    def on_worker_lost(self, stage: str, worker: str) -> None:
        """A worker has left, died, or been silent for too long."""
        self._candidates.pop((stage, worker), None)

    def on_quiesced(self, stage: str, worker: str, term: int, status: TrainingStatus) -> None:
        """A member has discarded its step."""
        if self.phase == "quiescing" and term == self.term and self.members.get(stage) == worker:
            self._quiesced[stage] = status

    def on_restored(self, stage: str, worker: str, term: int, now_s: float, problem: str = "") -> None:
        """A member has restored the version, or reports the `problem` that prevented it."""
        if self.phase == "restoring" and term == self.term and self.members.get(stage) == worker:
            if problem:
                self._stop(f"stage {stage!r}, worker {worker!r}: {problem}", now_s)
            else:
                self._restored.add(stage)

    def on_progress(self, now_s: float) -> None:
        """An operation of a step has been run."""
        self._progress_s = now_s

    def end_term(self, reason: str) -> None:
        """End the current term: a step or the connection is lost."""
        if self.phase != "waiting":
            self.phase = "waiting"
            self.term_reason = reason

    def tick(
        self, now_s: float, unix_ms: int, sources: Collection[str] = (), lost_sources: Collection[str] = ()
    ) -> list[CoordinatorCommand]:
        """Return the commands that follow from all events so far; to be called after each of them, and each second.

        `sources`: those with a step in the queue of this worker; `lost_sources`: those that have left or are silent.
        """
        if now_s - self._last_tick_s > FROZEN_S:
            self._listen_until_s = now_s + LISTEN_S
        self._last_tick_s = now_s
        if now_s < self._listen_until_s:
            return []
        self._elect_leader()
        if not self.is_leader:
            return []
        self._check_steps(now_s, sources, lost_sources)
        commands = []
        while command := self._next_command(now_s, unix_ms):
            commands.append(command)
        return commands

    def _elect_leader(self) -> None:
        was_leader = self.is_leader
        others = [
            candidate
            for (stage, worker), candidate in self._candidates.items()
            if stage == self.stages[0] and worker != self.own_worker
        ]
        # A draining leader finishes its step: it leads until it has left.
        rivals = [candidate for candidate in others if candidate.record.state != "standby"]
        if was_leader:
            own_rank = (self.term, self.own_worker)
            self.is_leader = all((rival.status.term, rival.record.worker) < own_rank for rival in rivals)
        else:
            self.is_leader = not rivals and all(self.own_worker < other.record.worker for other in others)
        if self.is_leader != was_leader:
            log.info("worker %s is %s the coordinator", self.own_worker, "now" if self.is_leader else "no longer")
            self.end_term("the coordinator has changed")

    def _check_steps(self, now_s: float, sources: Collection[str], lost_sources: Collection[str]) -> None:
        if self.phase != "training" or not sources:
            self._progress_s = now_s
        elif lost := sorted(set(sources) & set(lost_sources)):
            self.end_term(f"source {lost[0]} was lost in the middle of a step")
        elif now_s - self._progress_s > self.lease_s:
            self.end_term(f"a step made no progress for {self.lease_s:g} s")

    def _next_command(self, now_s: float, unix_ms: int) -> CoordinatorCommand | None:
        if self.phase in ("quiescing", "restoring") and now_s - self._phase_begin_s > self.lease_s:
            self.end_term(f"not all stages have answered within {self.lease_s:g} s")
        if self.phase != "waiting" and (reason := self._find_lost_member()):
            self.end_term(reason)
        match self.phase:
            case "waiting" if now_s >= self._retry_s:
                return self._begin_term(now_s, unix_ms)
            case "quiescing" if len(self._quiesced) == len(self.stages):
                return self._restore(now_s)
            case "restoring" if len(self._restored) == len(self.stages):
                self.phase = "training"
                self.problem = ""
                log.info("term %d begins: %s", self.term, self.term_reason)
        return None

    def _find_lost_member(self) -> str:
        """Return why a member may have missed messages; empty if none has."""
        for stage, worker in self.members.items():
            candidate = self._candidates.get((stage, worker))
            if candidate is None:
                return f"worker {worker} of stage {stage} is gone"
            if candidate.process_key != self._process_keys[stage]:
                is_same_process = candidate.process_key[:2] == self._process_keys[stage][:2]
                return f"worker {worker} of stage {stage} {'was disconnected' if is_same_process else 'has restarted'}"
        return ""

    def _begin_term(self, now_s: float, unix_ms: int) -> CoordinatorCommand | None:
        members = {}
        for stage in self.stages:
            worker = self._choose_member(stage)
            if worker is None:
                return None
            members[stage] = worker
        self.term = max(unix_ms, self.term + 1, *(item.status.term + 1 for item in self._candidates.values()))
        self.members = members
        self.phase = "quiescing"
        self._phase_begin_s = now_s
        self._process_keys = {stage: self._candidates[stage, name].process_key for stage, name in members.items()}
        self._quiesced.clear()
        self._restored.clear()
        return CoordinatorCommand("quiesce", self.term, dict(members))

    def _choose_member(self, stage: str) -> str | None:
        """Choose a worker: the former member, else the one with the newest checkpoint, else the first by name."""
        workers = {
            worker: max(candidate.status.checkpoints, default=0)
            for (name, worker), candidate in self._candidates.items()
            if name == stage and candidate.is_live and candidate.record.state in ("up", "standby")
        }
        if stage == self.stages[0]:  # the leader itself is its member
            workers = {worker: newest for worker, newest in workers.items() if worker == self.own_worker}
        former = self.members.get(stage)
        return min(workers, key=lambda worker: (worker != former, -workers[worker], worker), default=None)

    def _restore(self, now_s: float) -> CoordinatorCommand | None:
        available = {stage: {0, *status.checkpoints} for stage, status in self._quiesced.items()}
        # A member that missed a term may have in memory a version that the others rolled back and trained again.
        restored_term = max(status.restored_term for status in self._quiesced.values())
        for stage, status in self._quiesced.items():
            if status.version is not None and status.restored_term == restored_term:
                available[stage].add(status.version)
        version = max(set.intersection(*available.values()))
        for stage, status in self._quiesced.items():
            # A stage with two checkpoints proves that all stages had written the older one.
            if len(status.checkpoints) > 1 and version < status.checkpoints[-2]:
                lacking = ", ".join(
                    f"stage {other!r} has {_format_versions(self._quiesced[other].checkpoints)}"
                    for other in self.stages
                    if status.checkpoints[-2] not in available[other]
                )
                problem = (
                    f"no version is on all stages: stage {stage!r} has checkpoints of "
                    f"{_format_versions(status.checkpoints)}, {lacking}; start that stage with the folder of its "
                    "checkpoints, or move the checkpoints of all stages away to start from the beginning"
                )
                self._stop(problem, now_s)
                return None
        self.phase = "restoring"
        self._phase_begin_s = now_s
        return CoordinatorCommand("restore", self.term, dict(self.members), version, restored_term)

    def _stop(self, problem: str, now_s: float) -> None:
        """Wait for a change before the next term; sources read the problem in the presence record."""
        self.phase = "waiting"
        self.problem = problem
        self.term_reason = problem
        self._retry_s = now_s + RETRY_DELAY_S

    def extend_status(self, status: TrainingStatus) -> TrainingStatus:
        """Add the term and its members to the status of this worker, if it leads: sources train with these."""
        if not self.is_leader:
            return status
        change = {
            "term": self.term,
            "members": self.members if self.phase == "training" else {},
            "problem": self.problem[:_TEXT_MAX_CHARS],
            "term_reason": self.term_reason[:_TEXT_MAX_CHARS],
        }
        return status.model_copy(update=change)


def _format_versions(versions: tuple[int, ...]) -> str:
    return " and ".join(map(str, versions)) or "none"
