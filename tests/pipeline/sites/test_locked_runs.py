"""Whole runs behind locked doors, each process with an identity of its own: no right is missing, and none is idle."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from brokers.config.bridge_rules import Bridge
from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.security.acl import users
from brokers.security.principals import all_sites, broker_name
from tests.soak.harness.training_run import assert_equal, expected, lesson_file
from tests.support.brokers.locked_broker import Door, hashed, locked
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import need
from tests.support.pipelines.pipeline_files import counter, pipeline_file, stage
from tests.support.pipelines.processes import Machine, Running, eventually

# The broker of the device keeps a bridge to that of the cloud.
TWO_SITES = '[[site]]\nname = "device"\nlinks = [{ to = "cloud" }]\n[[site]]\nname = "cloud"\n'


@contextmanager
def brokers_of(folder: Path, pipeline: Pipeline) -> Iterator[dict[str, Door]]:
    """A locked broker for each site, and the bridges between them."""
    ports = {site: free_port() for site in all_sites(pipeline)}
    links = [(table.name, link.to) for table in pipeline.site for link in table.links]
    with ExitStack() as stack:
        doors = {}
        for site, port in ports.items():
            bridges = tuple(
                Bridge(
                    near,
                    far,
                    "localhost",
                    ports[far],
                    pipeline.sites.crossing(near, far),
                    tls=folder / "certs" / broker_name(near),
                )
                for near, far in links
                if near == site
            )
            doors[site] = stack.enter_context(locked(folder, pipeline, site, port=port, bridges=bridges))
        yield doors


def covers(topic_filter: str, topic: str) -> bool:
    wanted, levels = topic_filter.split("/"), topic.split("/")
    return len(wanted) == len(levels) and all(a in ("+", b) for a, b in zip(wanted, levels, strict=True))


class Operators:
    """Start each process of a pipeline with its own identity, at the broker of its site."""

    def __init__(self, box: Machine, pipeline: Pipeline, doors: dict[str, Door]) -> None:
        self.box, self.pipeline, self.doors = box, pipeline, doors

    def start(self, site: str, who: str, *words: str | Path) -> Running:
        door = self.doors[site]
        environment = {"SPARSE_TLS": str(door.certs / who)}
        return self.box.sparse(*words, "--broker", door.address, environment=environment)

    def stages(self, *options: str | Path) -> list[Running]:
        return [
            self.start(each.site, f"{self.pipeline.name}.{each.name}", "stage", self.pipeline.path, each.name, *options)
            for each in self.pipeline.stage
        ]

    def source(self) -> Running:
        words = ("source", self.pipeline.path, "--json", "--out", self.box.folder / "out")
        return self.start(self.pipeline.source.site, f"{self.pipeline.name}.source", *words)

    def nothing_was_refused(self) -> None:
        assert {site: door.denied() for site, door in self.doors.items()} == {site: [] for site in self.doors}

    def unused(self) -> set[tuple[str, str, str]]:
        """Rights of stages and sources that were not needed: who, what, which filter."""
        return {
            (who, verb, topic_filter)
            for site, door in self.doors.items()
            for who, rights in users(self.pipeline, site).items()
            if who.startswith(f"{self.pipeline.name}.")
            for topic_filter, access in rights.items()
            for verb in ("read", "write")
            if verb in access
            and not any(each[:2] == (who, verb) and covers(topic_filter, each[2]) for each in door.used())
        }


def end_well(stages: list[Running]) -> None:
    for each in stages:
        said = each.end(signal.SIGTERM)
        assert said.status == 0, said.err
        assert "refused" not in said.err


@pytest.mark.parametrize("sites", [("local", "local"), ("device", "cloud")], ids="-".join)
def test_an_inference_run_has_the_rights_that_it_uses_and_no_more(box: Machine, sites: tuple[str, str]) -> None:
    names = (("double", "double"), ("add", "add_one"))
    stages = [stage(name, made, site=site) for (name, made), site in zip(names, sites, strict=True)]
    path = pipeline_file(box.folder, stages, counter(20, site=sites[0]))
    if "cloud" in sites:
        path.write_text(path.read_text() + TWO_SITES)
    pipeline = load_pipeline(path)
    with brokers_of(box.folder, pipeline) as doors:
        people = Operators(box, pipeline, doors)
        running = people.stages()
        source = people.source().end()
        assert source.status == 0, source.err
        assert (source.answer["results"], source.answer["retries"]) == (20, 0)
        for site in doors:  # presence crosses
            shown = people.start(site, "monitor", "status", pipeline.path, "--json").end()
            assert {each["stage"] for each in shown.answer["workers"]} == {"double", "add"}
        end_well(running)
        people.nothing_was_refused()
        double, add = (f"sparse/{site}/test/{name}" for site, (name, _) in zip(sites, names, strict=True))
        front_doors = {("test.double", "read", f"{double}/tasks"), ("test.add", "read", f"{add}/tasks")}
        # Both are of a user's own code, which may send work back, or round once more.
        detours = {
            ("test.add", "read", f"{double}/up/+"),
            ("test.add", "write", f"{add}/in/+"),
            ("test.double", "write", f"{double}/in/+"),
        }
        assert people.unused() == front_doors | detours
    box.nothing_is_left()


def test_a_training_run_has_the_rights_that_it_uses_and_no_more(box: Machine) -> None:
    sites = ("device", "cloud", "device")
    pipeline = load_pipeline(lesson_file(box.folder, epochs=2, sites=sites))
    with brokers_of(box.folder, pipeline) as doors:
        people = Operators(box, pipeline, doors)
        running = people.stages("--checkpoints", box.folder / "versions")
        source = people.source().end()
        assert source.status == 0, source.err
        assert (source.answer["steps"], source.answer["rolled_back"]) == (6, 0)
        assert_equal(load_file(box.folder / "out" / "model.safetensors"), expected(6))
        end_well(running)
        people.nothing_was_refused()
        # Only a second source of this name would be heard there.
        assert people.unused() == {("lesson.source", "read", "sparse/device/lesson/source/up/+")}


def test_a_run_by_passwords_shows_them_to_nobody(box: Machine) -> None:
    """Not in the list of processes, not in what is logged however much is, not in what is left behind."""
    path = pipeline_file(box.folder, [stage("double", "double")], counter(20))
    passwords = {"test.double": "correct horse battery", "test.source": "staple correct horse"}
    with locked(box.folder, path, passwords=hashed(box.folder / "passwords", passwords)) as door:
        trusting = box.folder / "trusting"
        trusting.mkdir()
        (trusting / "ca.crt").write_bytes((door.certs / "viewer" / "ca.crt").read_bytes())
        place = door.address.removeprefix("mqtts://")

        def start(user: str, *words: str | Path) -> Running:
            secret = box.folder / f"{user}.password"
            secret.touch(mode=0o600)
            secret.write_text(f"{passwords[user]}\n")
            environment = {"SPARSE_TLS": str(trusting), "SPARSE_PASSWORD_FILE": str(secret)}
            return box.sparse("-vv", *words, "--broker", f"mqtts://{user}@{place}", environment=environment)

        worker = start("test.double", "stage", path, "double")
        source = start("test.source", "source", path, "--json", "--out", box.folder / "out")
        seen = " ".join(f"{each.cmdline()} {each.environ()}" for each in box.alive())
        assert "mqtts://test.double@" in seen
        ended = source.end()
        assert ended.answer["results"] == 20, ended.err
        said = worker.end(signal.SIGTERM)
        assert said.status == 0, said.err
        assert door.denied() == []
        left = [each.read_text(errors="replace") for each in (box.folder / "out").rglob("*") if each.is_file()]
        for text in (seen, ended.out, ended.err, said.out, said.err, door.said(), *left):
            assert not any(password in text for password in passwords.values())


def test_sparse_run_is_an_operator(box: Machine) -> None:
    """All that it starts has its identity."""
    path = pipeline_file(box.folder, [stage("double", "double"), stage("add", "add_one")], counter(20))
    with locked(box.folder, path) as door:
        environment = {"SPARSE_TLS": str(door.certs / "operator")}
        words = ("run", path, "--json", "--broker", door.address, "--out", box.folder / "out")
        said = box.sparse(*words, environment=environment).end()
        assert said.status == 0, said.err
        assert (said.answer["results"], said.answer["broker"]) == (20, door.address)
        assert door.denied() == []
    box.nothing_is_left()


def test_a_camera_and_a_viewer_are_any_mqtt_clients_with_a_certificate(box: Machine) -> None:
    path = pipeline_file(box.folder, [stage("double", "double")], {"kind": "ingress", "keep": "all"})
    path.write_text(path.read_text() + '[[site]]\nname = "local"\ncameras = ["door"]\n')
    pipeline = load_pipeline(path)
    with locked(box.folder, pipeline) as door:
        people = Operators(box, pipeline, {"local": door})

        def client(program: str, who: str, *words: str) -> Running:
            mine = door.certs / who
            keys = ("--cafile", mine / "ca.crt", "--cert", mine / "tls.crt", "--key", mine / "tls.key")
            return box.start(need(program), "-V", "5", "-p", str(door.port), "-h", "localhost", *keys, *words)

        running = [*people.stages(), people.source()]
        viewer = client("mosquitto_sub", "viewer", "-t", "sparse/local/results/#")

        def answered() -> bool:
            reading = '{"values": 21}'
            words = ("-q", "1", "-t", "sparse/local/ingress/door", "-m", reading)
            assert client("mosquitto_pub", "camera.door", *words).end().status == 0
            return '"door"' in viewer.out()

        eventually("a result", answered)
        assert json.loads(viewer.out().splitlines()[0])["source"] == "door"
        assert door.denied() == []
        client("mosquitto_pub", "camera.door", "-t", "sparse/local/ingress/gate", "-m", "{}").end()
        eventually("a refusal", door.denied)
        end_well(running)
        viewer.end(signal.SIGTERM)
