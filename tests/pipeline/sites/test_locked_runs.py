"""Pipelines with TLS and access control, each process with an identity: no right is missing, and none is unused."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import load_file

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.config.topology import Bridge
from brokers.security.acl import acl_by_user, all_sites, broker_username
from tests.soak.harness.training_run import assert_weights_equal, expected_weights, write_training_pipeline_file
from tests.support.brokers.locked_broker import SecureBroker, start_secure_broker, write_password_file
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

# The broker of the device has a bridge to that of the cloud.
TWO_SITES = '[[site]]\nname = "device"\nlinks = [{ to = "cloud" }]\n[[site]]\nname = "cloud"\n'
Right = tuple[str, str, str]  # user, "read" or "write", topic filter


@contextmanager
def start_brokers(folder: Path, pipeline: Pipeline) -> Iterator[dict[str, SecureBroker]]:
    """A broker with access control for each site, and the bridges between them."""
    ports = {site: free_port() for site in all_sites(pipeline)}
    links = [(table.name, link.to) for table in pipeline.site for link in table.links]
    with ExitStack() as stack:
        brokers = {}
        for site, port in ports.items():
            tls = folder / "certs" / broker_username(site)
            bridges = tuple(
                Bridge(near, far, "localhost", ports[far], pipeline.topology.bridge_sides(near, far), tls=tls)
                for near, far in links
                if near == site
            )
            broker = start_secure_broker(folder, pipeline, site, port=port, bridges=bridges)
            brokers[site] = stack.enter_context(broker)
        yield brokers


def filter_covers(topic_filter: str, topic: str) -> bool:
    expected, levels = topic_filter.split("/"), topic.split("/")
    return len(expected) == len(levels) and all(a in ("+", b) for a, b in zip(expected, levels, strict=True))


class SecurePipeline:
    """Starts the processes of a pipeline, each with its identity, at the broker of its site."""

    def __init__(self, sandbox: ProcessSandbox, pipeline: Pipeline, brokers: dict[str, SecureBroker]) -> None:
        self._sandbox = sandbox
        self._pipeline = pipeline
        self._brokers = brokers

    def start(self, site: str, identity: str, *arguments: str | Path) -> RunningCommand:
        broker = self._brokers[site]
        environment = {"SPARSE_TLS": str(broker.certs / identity)}
        return self._sandbox.start_sparse(*arguments, "--broker", broker.address, environment=environment)

    def start_stages(self, *options: str | Path) -> list[RunningCommand]:
        name, path = self._pipeline.name, self._pipeline.path
        return [
            self.start(stage.site, f"{name}.{stage.name}", "stage", path, stage.name, *options)
            for stage in self._pipeline.stage
        ]

    def start_source(self) -> RunningCommand:
        arguments = ("source", self._pipeline.path, "--json", "--out", self._sandbox.folder / "out")
        return self.start(self._pipeline.source.site, f"{self._pipeline.name}.source", *arguments)

    def assert_nothing_was_denied(self) -> None:
        for broker in self._brokers.values():
            assert broker.denied_lines() == []

    def unused_rights(self) -> set[Right]:
        """The rights of the stages and the source of which no use is in the logs of the brokers."""
        return {
            (user, verb, topic_filter)
            for site, broker in self._brokers.items()
            for user, rights in acl_by_user(self._pipeline, site).items()
            if user.startswith(f"{self._pipeline.name}.")
            for topic_filter, access in rights.items()
            for verb in ("read", "write")
            if verb in access
            and not any(each[:2] == (user, verb) and filter_covers(topic_filter, each[2]) for each in broker.accesses())
        }


def stop_stages(stages: list[RunningCommand]) -> None:
    for stage in stages:
        result = stage.wait(signal.SIGTERM)
        assert result.returncode == 0, result.stderr
        assert "refused" not in result.stderr


def test_inference_has_only_the_rights_that_it_uses(sandbox: ProcessSandbox) -> None:
    stages = [stage_table("double", "double", site="device"), stage_table("add", "add_one", site="cloud")]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(20, site="device"))
    path.write_text(path.read_text() + TWO_SITES)
    pipeline = load_pipeline(path)
    with start_brokers(sandbox.folder, pipeline) as brokers:
        processes = SecurePipeline(sandbox, pipeline, brokers)
        workers = processes.start_stages()
        result = processes.start_source().wait()
        assert result.returncode == 0, result.stderr
        assert (result.json_output["results"], result.json_output["retries"]) == (20, 0)
        for site in brokers:  # presence records cross the bridge
            status = processes.start(site, "monitor", "status", pipeline.path, "--json").wait()
            assert {worker["stage"] for worker in status.json_output["workers"]} == {"double", "add"}
        stop_stages(workers)
        processes.assert_nothing_was_denied()
        double, add = "sparse/device/test/double", "sparse/cloud/test/add"
        shared_task_topics = {("test.double", "read", f"{double}/tasks"), ("test.add", "read", f"{add}/tasks")}
        # Executors of users may dispatch to an earlier stage, or to their own.
        dispatch = {
            ("test.add", "read", f"{double}/up/+"),
            ("test.add", "write", f"{add}/in/+"),
            ("test.double", "write", f"{double}/in/+"),
        }
        assert processes.unused_rights() == shared_task_topics | dispatch
    sandbox.assert_nothing_left()


def test_training_has_only_the_rights_that_it_uses(sandbox: ProcessSandbox) -> None:
    sites = ("device", "cloud", "device")
    pipeline = load_pipeline(write_training_pipeline_file(sandbox.folder, epochs=2, sites=sites))
    with start_brokers(sandbox.folder, pipeline) as brokers:
        processes = SecurePipeline(sandbox, pipeline, brokers)
        workers = processes.start_stages("--checkpoints", sandbox.folder / "checkpoints")
        result = processes.start_source().wait()
        assert result.returncode == 0, result.stderr
        assert (result.json_output["steps"], result.json_output["rollbacks"]) == (6, 0)
        assert_weights_equal(load_file(sandbox.folder / "out" / "model.safetensors"), expected_weights(6))
        stop_stages(workers)
        processes.assert_nothing_was_denied()
        # A second source of this name would use it.
        assert processes.unused_rights() == {("training.source", "read", "sparse/device/training/source/up/+")}


def test_passwords_are_not_shown(sandbox: ProcessSandbox) -> None:
    """They are not in arguments of processes, in logs of any level, or in the files of the run."""
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double")], counting_source_table(20))
    passwords = {"test.double": "correct horse battery", "test.source": "staple correct horse"}
    password_file = write_password_file(sandbox.folder / "passwords", passwords)
    with start_secure_broker(sandbox.folder, path, password_file=password_file) as broker:
        ca_folder = sandbox.folder / "ca"
        ca_folder.mkdir()
        (ca_folder / "ca.crt").write_bytes((broker.certs / "viewer" / "ca.crt").read_bytes())
        host = broker.address.removeprefix("mqtts://")

        def start(user: str, *arguments: str | Path) -> RunningCommand:
            own_file = sandbox.folder / f"{user}.password"
            own_file.touch(mode=0o600)
            own_file.write_text(f"{passwords[user]}\n")
            environment = {"SPARSE_TLS": str(ca_folder), "SPARSE_PASSWORD_FILE": str(own_file)}
            return sandbox.start_sparse(
                "-vv", *arguments, "--broker", f"mqtts://{user}@{host}", environment=environment
            )

        worker = start("test.double", "stage", path, "double")
        source = start("test.source", "source", path, "--json", "--out", sandbox.folder / "out")
        commands = str([command for _, command in sandbox.live_commands()])
        assert "mqtts://test.double@" in commands
        source_result = source.wait()
        assert source_result.json_output["results"] == 20, source_result.stderr
        worker_result = worker.wait(signal.SIGTERM)
        assert worker_result.returncode == 0, worker_result.stderr
        assert broker.denied_lines() == []
        files = [file.read_text(errors="replace") for file in (sandbox.folder / "out").rglob("*") if file.is_file()]
        output = [text for result in (source_result, worker_result) for text in (result.stdout, result.stderr)]
        for text in (commands, *output, broker.read_log(), *files):
            assert not any(password in text for password in passwords.values())


def test_run_gives_its_identity_to_its_processes(sandbox: ProcessSandbox) -> None:
    stages = [stage_table("double", "double"), stage_table("add", "add_one")]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(20))
    with start_secure_broker(sandbox.folder, path) as broker:
        environment = {"SPARSE_TLS": str(broker.certs / "operator")}
        arguments = ("run", path, "--json", "--broker", broker.address, "--out", sandbox.folder / "out")
        result = sandbox.run_sparse(*arguments, environment=environment)
        assert result.returncode == 0, result.stderr
        assert (result.json_output["results"], result.json_output["broker"]) == (20, broker.address)
        assert broker.denied_lines() == []
    sandbox.assert_nothing_left()


def test_camera_and_viewer_are_mqtt_clients_with_a_certificate(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double")], {"kind": "ingress", "keep": "all"})
    path.write_text(path.read_text() + '[[site]]\nname = "local"\ncameras = ["door"]\n')
    pipeline = load_pipeline(path)
    with start_secure_broker(sandbox.folder, pipeline) as broker:
        processes = SecurePipeline(sandbox, pipeline, {"local": broker})

        def start_client(program: str, identity: str, *arguments: str) -> RunningCommand:
            folder = broker.certs / identity
            tls = ("--cafile", folder / "ca.crt", "--cert", folder / "tls.crt", "--key", folder / "tls.key")
            options = ("-V", "5", "-h", "localhost", "-p", str(broker.port), *tls)
            return sandbox.start(require_dependency(program), *options, *arguments)

        commands = [*processes.start_stages(), processes.start_source()]
        viewer = start_client("mosquitto_sub", "viewer", "-t", "sparse/local/results/#")

        def publish(source: str, payload: str) -> bool:
            topic = f"sparse/local/ingress/{source}"
            client = start_client("mosquitto_pub", "camera.door", "-q", "1", "-t", topic, "-m", payload)
            return client.wait().returncode == 0

        def has_result() -> bool:
            assert publish("door", '{"values": 21}')
            return viewer.read_stdout().endswith("\n")

        eventually("a result", has_result)
        assert json.loads(viewer.read_stdout().splitlines()[0])["source"] == "door"
        assert broker.denied_lines() == []
        publish("gate", "{}")
        eventually("the denial", broker.denied_lines)
        stop_stages(commands)
        viewer.wait(signal.SIGTERM)
