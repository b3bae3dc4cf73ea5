"""A swarm, then docker-compose.yml: a picture is answered, stages scale, a container that dies costs nothing.

All but the first use one project that is up; each says first how many workers it needs.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.container.conftest import SERVICES
from tests.support.environment.container_engine import Compose, await_health, docker, inspect
from tests.support.environment.external_programs import need
from tests.support.environment.swarm import STACK, await_replicas, stack, swarm
from tests.support.pipelines.mqtt_camera import Door
from tests.support.pipelines.processes import eventually

PICTURES = 40


def workers_of(stage: str, answers: list[dict[str, Any]]) -> Counter[str]:
    """How many of these requests each worker of a stage did, by the name of its host: its container's id."""
    hops = [hop for answer in answers for hop in answer["time"]["stages"] if hop["stage"] == stage]
    return Counter(hop["worker"].rpartition("-")[0] for hop in hops)


def hosts_of(compose: Compose, service: str) -> set[str]:
    return {inspect(each)["Config"]["Hostname"] for each in compose.containers(service)}


def knock(port: int, certs: Path, identity: str | None) -> str:
    """What somebody is told who publishes to the ingress of the locked broker."""
    line = ["-h", "127.0.0.1", "-p", str(port), "-V", "5", "-q", "1", "-m", "{}", "-t", "sparse/local/ingress/door"]
    line += ["--cafile", f"{certs}/viewer/ca.crt"]
    if identity is not None:
        line += ["--cert", f"{certs}/{identity}/tls.crt", "--key", f"{certs}/{identity}/tls.key"]
    done = subprocess.run([need("mosquitto_pub"), *line], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


def test_the_stack_on_a_swarm_answers_a_picture_scales_and_leaves_nothing(
    image: str, photograph: Path, tmp_path: Path
) -> None:
    """Of deploy/swarm, on a swarm of this machine. First, as it must be over when the compose project is up."""
    assert image
    with swarm(), stack(tmp_path) as port:
        door = Door(port, certs=tmp_path)
        try:
            door.show(photograph)
            assert {"car", "bicycle", "dog"} <= {each["label"] for each in door.answer(90)["objects"]}

            docker("service", "scale", "--detach", f"{STACK}_body=2")
            await_replicas("body", 2)
            for _ in range(20):
                door.show(photograph)
            assert len(workers_of("body", door.answers(20))) == 2

            docker("service", "scale", "--detach", f"{STACK}_body=1")
            await_replicas("body", 1)
        finally:
            door.close()
        assert "Error" in knock(port, tmp_path, None), "nobody comes in without a certificate"
        assert "Not authorized" in knock(port, tmp_path, "viewer"), "or does what is not theirs"
        # A site that no node has gets no task.
        docker("service", "update", "--detach", "--constraint-add", "node.labels.site == cloud", f"{STACK}_tail")
        listed = ("service", "ps", "--no-trunc", f"{STACK}_tail")
        eventually("a task without a node", lambda: "no suitable node" in docker(*listed))


def test_a_photograph_published_from_outside_gives_its_detections(door: Door, photograph: Path) -> None:
    door.show(photograph)
    answer = door.answer()
    assert answer["picture"] == {"width": 768, "height": 576}
    found = {each["label"]: each for each in answer["objects"]}
    assert {"car", "bicycle", "dog"} <= found.keys()
    left, top, width, height = found["dog"]["box"]
    assert (left + width / 2, top + height / 2) == pytest.approx((220, 376), abs=40)


def test_the_file_as_a_whole_is_one_that_the_engine_takes(compose: Compose) -> None:
    """Telemetry included, whose images are not started here."""
    read = yaml.safe_load(compose("--profile", "telemetry", "config"))
    assert set(read["services"]) == {*SERVICES, "recorder", "influxdb", "chronograf", "grafana"}


def test_no_container_may_write_its_files_or_become_more_than_it_is(compose: Compose) -> None:
    for service in SERVICES:
        for each in compose.containers(service):
            seen = inspect(each)
            limits = seen["HostConfig"]
            assert limits["ReadonlyRootfs"], service
            assert limits["CapDrop"] == ["ALL"], service
            assert limits["SecurityOpt"] == ["no-new-privileges:true"], service
            assert limits["Memory"] > 0, service
            assert seen["Config"]["User"] not in ("", "0", "root"), service


def test_a_stage_that_is_scaled_to_three_is_worked_by_three(compose: Compose, door: Door, photograph: Path) -> None:
    compose.up(*SERVICES, scale={"body": 3})
    assert len(hosts_of(compose, "body")) == 3
    for _ in range(PICTURES):
        door.show(photograph)
    assert set(workers_of("body", door.answers(PICTURES))) == hosts_of(compose, "body")
    with urllib.request.urlopen(f"http://127.0.0.1:{compose.monitor_port}/stages", timeout=10) as answer:
        stages = json.load(answer)["street"]
    assert {name: stages[name]["workers"] for name in stages} == {"head": 1, "body": 3, "tail": 1}
    assert stages["body"]["queue_ms"] >= 0


def test_a_container_that_is_killed_under_load_costs_no_picture_and_doubles_none(
    compose: Compose, door: Door, photograph: Path
) -> None:
    compose.up(*SERVICES, scale={"body": 3})
    victim = compose.containers("body")[0]
    docker("pause", victim)  # so that it is sure to have tasks in hand when it dies: it takes them, and no more
    for _ in range(PICTURES):
        door.show(photograph)
    answers = door.answers(5)
    docker("kill", victim)  # which lets a paused container run, after the signal
    answers += door.answers(PICTURES - 5)
    first = min(answer["index"] for answer in answers)
    assert sorted(answer["index"] for answer in answers) == list(range(first, first + PICTURES))
    assert len({answer["request"] for answer in answers}) == PICTURES
    assert all("error" not in answer for answer in answers)
    assert inspect(victim)["State"]["ExitCode"] == 137
    assert max(answer["attempts"] for answer in answers) > 1, "it held nothing when it died"
    assert door.silent()


def test_a_container_that_is_stopped_finishes_what_it_holds(compose: Compose, door: Door, photograph: Path) -> None:
    compose.up(*SERVICES, scale={"body": 3})
    leaver = compose.containers("body")[0]
    for _ in range(PICTURES):
        door.show(photograph)
    answers = door.answers(5)
    begun_s = time.monotonic()
    docker("stop", leaver)
    stopped_s = time.monotonic() - begun_s
    answers += door.answers(PICTURES - 5)
    assert inspect(leaver)["State"]["ExitCode"] == 0
    assert stopped_s < 25, "the engine waits for 30 s, then it kills"
    assert {answer["attempts"] for answer in answers} == {1}


def test_a_stage_that_is_scaled_back_to_one_is_worked_by_one(compose: Compose, door: Door, photograph: Path) -> None:
    compose.up(*SERVICES, scale={"body": 3})
    compose.up(*SERVICES, scale={"body": 1})
    (left,) = hosts_of(compose, "body")
    for _ in range(5):
        door.show(photograph)
    assert workers_of("body", door.answers(5)) == {left: 5}
    assert door.silent()


def test_a_worker_is_unhealthy_while_its_broker_is_away(compose: Compose) -> None:
    body = compose.containers("body")[0]
    (broker,) = compose.containers("broker")
    docker("stop", "--time", "5", broker)
    try:
        end_s = time.monotonic() + 90
        while inspect(body)["State"]["Health"]["Status"] != "unhealthy":
            assert time.monotonic() < end_s
            time.sleep(1)
    finally:
        docker("start", broker)
    await_health([broker, body])
