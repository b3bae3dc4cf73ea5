"""Training over an in-memory broker: errors that end a run, and the message for its user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from brokers.errors import RequestError, SparseError, UsageError, WireError
from brokers.protocol.messages import (
    StepMessage,
    Task,
)
from brokers.protocol.training import SOURCES_LIMIT, MicroBatch, SourceProgress
from sources.datasets.dataset import Dataset
from sources.training import training_loop
from sources.training.two_phase_step import StepFailed
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import assert_bitwise_equal
from tests.support.training.in_process_pipeline import (
    STEPS,
    InProcessPipeline,
    assert_weights,
    run_with_pipeline,
)
from tests.support.training.striped_images import ExtraClassImages, StripedImages


@pytest.mark.parametrize(
    ("dataset", "training", "message"),
    [
        (ExtraClassImages(count=24), {}, r"step 0 failed at stage 's2', worker 'w2-2': BadLabels: label 4 .*4 classes"),
        (StripedImages(), {"lr": 1e38}, r"step [12] failed at stage 's2', .*: NotFinite: .*a lower learning rate"),
    ],
    ids=["labels", "loss"],
)
def test_failed_step_names_its_stage(tmp_path: Path, dataset: Dataset, training: dict[str, Any], message: str) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        with pytest.raises(StepFailed, match=message) as caught:
            await pipeline.train(dataset=dataset)
        assert "\n" not in str(caught.value)
        assert all(worker.is_running for worker in pipeline.workers)
        await pipeline.wait_for("the saved forwards to be discarded", lambda: pipeline.saved_activations == 0)

    run_with_pipeline(tmp_path, test, **training)


def test_weights_that_are_not_finite_are_rolled_back(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()

        def break_weights(event: Any) -> None:
            for parameter in pipeline.workers[1].part_trainer._module.parameters():
                parameter.data.fill_(float("inf"))

        pipeline.on_event = break_weights
        other = await pipeline.add_source("other", StripedImages(seed=1))
        with pytest.raises(StepFailed, match=r"step 1 failed at stage 's2', .*: NotFinite: the loss is nan"):
            await other.training.run()
        await pipeline.wait_for("the rollback", lambda: {worker.version for worker in pipeline.workers} == {4})
        await pipeline.wait_for("a term", lambda: other.training.membership.term)
        term = other.training.membership.term
        assert term is not None
        assert "parameter 'second.weight' is not finite" in term.term_reason
        expected = pipeline.train_unsplit(["source"] * 4, {"source": StripedImages()})
        assert_bitwise_equal(await pipeline.weights(other), expected)

    run_with_pipeline(tmp_path, test, epochs=1)


def test_missing_stage_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "MEMBERS_WAIT_S", 0.5)

    async def test(pipeline: InProcessPipeline) -> None:
        with raises_error(RequestError, "StagesMissing"):
            await pipeline.train()

    run_with_pipeline(tmp_path, test, 0, 2)


def test_source_of_a_used_name_must_resume(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        with raises_error(UsageError, "AlreadyTrained"):
            await pipeline.train()
        resumed = await pipeline.train(resume=True)
        assert resumed.events_of_kind("step") == []
        assert resumed.completed_steps == STEPS
        assert len(resumed.events_of_kind("resumed")) == 1
        other = await pipeline.train("another")
        assert len(other.events_of_kind("step")) == STEPS
        assert pipeline.sources_by_version() == ["source"] * STEPS + ["another"] * STEPS

    run_with_pipeline(tmp_path, test)


def test_source_cannot_resume_with_other_settings_or_data(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        file = pipeline.file
        table = file.training.model_copy(update={"batch": 12, "lr": 0.5})
        pipeline.file = file.model_copy(update={"training": table})
        with raises_error(UsageError, "SettingsChanged", match=r"batch was 24, is 12; lr was 0\.05, is 0\.5"):
            await pipeline.train(resume=True)
        pipeline.file = file
        with raises_error(UsageError, "SettingsChanged", match=r"rows was 96, is 120"):
            await pipeline.train(dataset=StripedImages(count=120), resume=True)
        settings = {"noise": 2, "colours": ["red"]}
        source = file.source.model_copy(update={"settings": settings})
        pipeline.file = file.model_copy(update={"source": source})
        changed = r"""source\.settings was '{}', is '{"colours": \["red"\], "noise": 2}'"""
        with raises_error(UsageError, "SettingsChanged", match=changed):
            await pipeline.train(resume=True)

    run_with_pipeline(tmp_path, test, epochs=1)


def test_source_of_other_stages_cannot_train(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        file = InProcessPipeline(tmp_path, cuts=(4,)).file
        stages = [
            stage.model_copy(update={"name": name}) for stage, name in zip(file.stage, ("s0", "end"), strict=True)
        ]
        pipeline.file = file.model_copy(update={"stage": stages})
        with raises_error(
            RequestError, "CannotTrain", match="its stages are s0, s1, s2, this file has s0, end"
        ) as caught:
            await pipeline.train()
        assert "\n" not in str(caught.value)

    run_with_pipeline(tmp_path, test)


def test_step_that_is_aborted_repeatedly_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "MAX_CONSECUTIVE_TERMS", 3)

    async def test(pipeline: InProcessPipeline) -> None:
        def refuse(task: Task, micro_batch: MicroBatch) -> None:
            raise WireError("Busy", "the queue is full", retry=True)

        pipeline.workers[1].worker.step_queue.add_task = refuse  # type: ignore[method-assign]
        with raises_error(RequestError, "CannotTrain", match=r"step 0 was aborted 3 times: Busy at stage s1"):
            await pipeline.train()
        terms = [
            message.term
            for _, message in pipeline.messages
            if isinstance(message, StepMessage) and message.verb == "quiesce"
        ]
        assert terms == sorted(terms)
        assert len(set(terms)) == 4  # the first one, and one after each abort

    run_with_pipeline(tmp_path, test)


def test_lost_checkpoint_folder_is_an_error_and_rolls_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "PROBLEM_WAIT_S", 0.3)

    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        await pipeline.replace_worker(1, tmp_path / "elsewhere")
        message = r"stage 's0' has checkpoints of 4 and 8, stage 's1' has none"
        with raises_error(RequestError, "CannotTrain", match=message) as caught:
            await pipeline.train(resume=True)
        assert "\n" not in str(caught.value)
        assert pipeline.workers[0].versions == (4, 8)
        assert pipeline.workers[0].version == 8

    run_with_pipeline(tmp_path, test)


def test_run_resumes_after_a_full_disk(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        checkpoints = pipeline.workers[1].executor.checkpoints
        save = checkpoints.save

        def fail(checkpoint: Any) -> None:
            raise SparseError("CannotCheckpoint", "the disk is full")

        checkpoints.save = fail  # type: ignore[method-assign]
        with pytest.raises(StepFailed, match=r"step 3 failed at stage 's1', worker .*: CannotCheckpoint: .*full"):
            await pipeline.train()
        checkpoints.save = save  # type: ignore[method-assign]
        source = await pipeline.train(resume=True)
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)


def test_number_of_sources_is_limited(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        for worker in pipeline.workers:
            worker.executor.progress = {f"s-{index}": SourceProgress(steps=1) for index in range(SOURCES_LIMIT)}
        with pytest.raises(StepFailed, match=r"TooManySources: 64 sources have trained this pipeline"):
            await pipeline.train()
        assert all(worker.is_running for worker in pipeline.workers)

    run_with_pipeline(tmp_path, test)
