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
from brokers.security.acl import acl_by_user
from brokers.security.principals import all_sites, broker_username
from tests.soak.harness.training_run import assert_weights_equal, expected_weights, write_training_pipeline_file
from tests.support.brokers.locked_broker import SecureBroker, start_secure_broker, write_password_file
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

# The broker of the device keeps a bridge to that of the cloud.
TWO_SITES = '[[site]]\nname = "device"\nlinks = [{ to = "cloud" }]\n[[site]]\nname = "cloud"\n'


@contextmanager
def brokers_of(folder: Path, pipeline: Pipeline) -> Iterator[dict[str, SecureBroker]]:
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
                    pipeline.topology.bridge_sides(near, far),
                    tls=folder / "certs" / broker_username(near),
                )
                for near, far in links
                if near == site
            )
            doors[site] = stack.enter_context(start_secure_broker(folder, pipeline, site, port=port, bridges=bridges))
        yield doors


def covers(topic_filter: str, topic: str) -> bool:
    wanted, levels = topic_filter.split("/"), topic.split("/")
    return len(wanted) == len(levels) and all(a in ("+", b) for a, b in zip(wanted, levels, strict=True))


class Operators:
    """Start each process of a pipeline with its own identity, at the broker of its site."""

    def __init__(self, sandbox: ProcessSandbox, pipeline: Pipeline, doors: dict[str, SecureBroker]) -> None:
        self.box, self.pipeline, self.doors = sandbox, pipeline, doors

    def start(self, site: str, who: str, *words: str | Path) -> RunningCommand:
        door = self.doors[site]
        environment = {"SPARSE_TLS": str(door.certs / who)}
        return self.box.start_sparse(*words, "--broker", door.address, environment=environment)

    def stages(self, *options: str | Path) -> list[RunningCommand]:
        return [
            self.start(each.site, f"{self.pipeline.name}.{each.name}", "stage", self.pipeline.path, each.name, *options)
            for each in self.pipeline.stage
        ]

    def source(self) -> RunningCommand:
        words = ("source", self.pipeline.path, "--json", "--out", self.box.folder / "out")
        return self.start(self.pipeline.source.site, f"{self.pipeline.name}.source", *words)

    def nothing_was_refused(self) -> None:
        assert {site: door.denied_lines() for site, door in self.doors.items()} == {site: [] for site in self.doors}

    def unused(self) -> set[tuple[str, str, str]]:
        """Rights of stages and sources that were not needed: who, what, which filter."""
        return {
            (who, verb, topic_filter)
            for site, door in self.doors.items()
            for who, rights in acl_by_user(self.pipeline, site).items()
            if who.startswith(f"{self.pipeline.name}.")
            for topic_filter, access in rights.items()
            for verb in ("read", "write")
            if verb in access
            and not any(each[:2] == (who, verb) and covers(topic_filter, each[2]) for each in door.accesses())
        }


def end_well(stages: list[RunningCommand]) -> None:
    for each in stages:
        said = each.wait(signal.SIGTERM)
        assert said.returncode == 0, said.stderr
        assert "refused" not in said.stderr


@pytest.mark.parametrize("sites", [("local", "local"), ("device", "cloud")], ids="-".join)
def test_an_inference_run_has_the_rights_that_it_uses_and_no_more(
    sandbox: ProcessSandbox, sites: tuple[str, str]
) -> None:
    names = (("double", "double"), ("add", "add_one"))
    stages = [stage_table(name, made, site=site) for (name, made), site in zip(names, sites, strict=True)]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(20, site=sites[0]))
    if "cloud" in sites:
        path.write_text(path.read_text() + TWO_SITES)
    pipeline = load_pipeline(path)
    with brokers_of(sandbox.folder, pipeline) as doors:
        people = Operators(sandbox, pipeline, doors)
        running = people.stages()
        source = people.source().wait()
        assert source.returncode == 0, source.stderr
        assert (source.json_output["results"], source.json_output["retries"]) == (20, 0)
        for site in doors:  # presence crosses
            shown = people.start(site, "monitor", "status", pipeline.path, "--json").wait()
            assert {each["stage"] for each in shown.json_output["workers"]} == {"double", "add"}
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
    sandbox.assert_nothing_left()


def test_a_training_run_has_the_rights_that_it_uses_and_no_more(sandbox: ProcessSandbox) -> None:
    sites = ("device", "cloud", "device")
    pipeline = load_pipeline(write_training_pipeline_file(sandbox.folder, epochs=2, sites=sites))
    with brokers_of(sandbox.folder, pipeline) as doors:
        people = Operators(sandbox, pipeline, doors)
        running = people.stages("--checkpoints", sandbox.folder / "versions")
        source = people.source().wait()
        assert source.returncode == 0, source.stderr
        assert (source.json_output["steps"], source.json_output["rolled_back"]) == (6, 0)
        assert_weights_equal(load_file(sandbox.folder / "out" / "model.safetensors"), expected_weights(6))
        end_well(running)
        people.nothing_was_refused()
        # Only a second source of this name would be heard there.
        assert people.unused() == {("training.source", "read", "sparse/device/training/source/up/+")}


def test_a_run_by_passwords_shows_them_to_nobody(sandbox: ProcessSandbox) -> None:
    """Not in the list of processes, not in what is logged however much is, not in what is left behind."""
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double")], counting_source_table(20))
    passwords = {"test.double": "correct horse battery", "test.source": "staple correct horse"}
    with start_secure_broker(
        sandbox.folder, path, password_file=write_password_file(sandbox.folder / "passwords", passwords)
    ) as door:
        trusting = sandbox.folder / "trusting"
        trusting.mkdir()
        (trusting / "ca.crt").write_bytes((door.certs / "viewer" / "ca.crt").read_bytes())
        place = door.address.removeprefix("mqtts://")

        def start(user: str, *words: str | Path) -> RunningCommand:
            secret = sandbox.folder / f"{user}.password"
            secret.touch(mode=0o600)
            secret.write_text(f"{passwords[user]}\n")
            environment = {"SPARSE_TLS": str(trusting), "SPARSE_PASSWORD_FILE": str(secret)}
            return sandbox.start_sparse("-vv", *words, "--broker", f"mqtts://{user}@{place}", environment=environment)

        worker = start("test.double", "stage", path, "double")
        source = start("test.source", "source", path, "--json", "--out", sandbox.folder / "out")
        seen = " ".join(f"{each.cmdline()} {each.environ()}" for each in sandbox.live_processes())
        assert "mqtts://test.double@" in seen
        ended = source.wait()
        assert ended.json_output["results"] == 20, ended.stderr
        said = worker.wait(signal.SIGTERM)
        assert said.returncode == 0, said.stderr
        assert door.denied_lines() == []
        left = [each.read_text(errors="replace") for each in (sandbox.folder / "out").rglob("*") if each.is_file()]
        for text in (seen, ended.stdout, ended.stderr, said.stdout, said.stderr, door.read_log(), *left):
            assert not any(password in text for password in passwords.values())


def test_sparse_run_is_an_operator(sandbox: ProcessSandbox) -> None:
    """All that it starts has its identity."""
    path = write_pipeline_file(
        sandbox.folder, [stage_table("double", "double"), stage_table("add", "add_one")], counting_source_table(20)
    )
    with start_secure_broker(sandbox.folder, path) as door:
        environment = {"SPARSE_TLS": str(door.certs / "operator")}
        words = ("run", path, "--json", "--broker", door.address, "--out", sandbox.folder / "out")
        said = sandbox.start_sparse(*words, environment=environment).wait()
        assert said.returncode == 0, said.stderr
        assert (said.json_output["results"], said.json_output["broker"]) == (20, door.address)
        assert door.denied_lines() == []
    sandbox.assert_nothing_left()


def test_a_camera_and_a_viewer_are_any_mqtt_clients_with_a_certificate(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double")], {"kind": "ingress", "keep": "all"})
    path.write_text(path.read_text() + '[[site]]\nname = "local"\ncameras = ["door"]\n')
    pipeline = load_pipeline(path)
    with start_secure_broker(sandbox.folder, pipeline) as door:
        people = Operators(sandbox, pipeline, {"local": door})

        def client(program: str, who: str, *words: str) -> RunningCommand:
            mine = door.certs / who
            keys = ("--cafile", mine / "ca.crt", "--cert", mine / "tls.crt", "--key", mine / "tls.key")
            return sandbox.start(
                require_dependency(program), "-V", "5", "-p", str(door.port), "-h", "localhost", *keys, *words
            )

        running = [*people.stages(), people.source()]
        viewer = client("mosquitto_sub", "viewer", "-t", "sparse/local/results/#")

        def answered() -> bool:
            reading = '{"values": 21}'
            words = ("-q", "1", "-t", "sparse/local/ingress/door", "-m", reading)
            assert client("mosquitto_pub", "camera.door", *words).wait().returncode == 0
            return '"door"' in viewer.read_stdout()

        eventually("a result", answered)
        assert json.loads(viewer.read_stdout().splitlines()[0])["source"] == "door"
        assert door.denied_lines() == []
        client("mosquitto_pub", "camera.door", "-t", "sparse/local/ingress/gate", "-m", "{}").wait()
        eventually("a refusal", door.denied_lines)
        end_well(running)
        viewer.wait(signal.SIGTERM)
