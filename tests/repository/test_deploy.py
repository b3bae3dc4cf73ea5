"""The files of deploy/ and docker-compose.yml agree with each other and the code, pin versions, limit privileges."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from brokers.cli import main
from brokers.config.pipeline_file import load_pipeline
from brokers.security.acl import MONITOR, broker_username, source_username, stage_username
from deploy.dashboards.chronograf import DIALECT
from deploy.dashboards.grafana import DATASOURCE
from tests.support.environment.checkout import ROOT, repository_files

SITES = "deploy/kubernetes/sites"
CONFIG = ROOT / "deploy/config"
LOCKED = "deploy/locked"
COMPOSE = ROOT / "docker-compose.yml"
STACKS = [ROOT / "deploy/swarm/stack.yml", ROOT / "deploy/swarm/telemetry.yml"]
OURS = {"gateway", "head", "body", "tail", "monitor"}
WITH_TELEMETRY = OURS - {"monitor"}
TELEMETRY = {"recorder", "influxdb", "chronograf", "grafana"}


def parsed(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def images() -> list[str]:
    """The images named in deploy/ and in the compose file."""
    images: list[str] = []
    for path in [
        COMPOSE,
        *repository_files("deploy/*.yml"),
        *repository_files("deploy/*.yaml"),
        ROOT / "deploy/Dockerfile",
    ]:
        references = re.findall(r"^\s*(?:image: |ARG BASE=)(\S+)$", path.read_text(), re.MULTILINE)
        images += [re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", image) for image in references]
    return images


def printed_config(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["broker", *command]) == 0
    return capsys.readouterr().out


def test_demo_broker_has_the_configuration_that_sparse_prints(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("config", "--open", "--data", "/mosquitto/data", str(CONFIG / "street.toml"), "local")
    assert (CONFIG / "mosquitto.conf").read_text() == printed_config(capsys, *arguments)


@pytest.mark.parametrize(
    ("pipeline", "site", "folder"),
    [
        (f"{LOCKED}/street.toml", "local", LOCKED),
        (f"{SITES}/pipeline/street.toml", "cloudlet", f"{SITES}/cloudlet"),
        (f"{SITES}/pipeline/street.toml", "cloud", f"{SITES}/cloud"),
    ],
    ids=["local", "cloudlet", "cloud"],
)
def test_other_brokers_have_the_access_control_that_sparse_prints(
    pipeline: str, site: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of = (str(ROOT / pipeline), site)
    where = ("--certs", "/mosquitto/certs", "--access", "/mosquitto/config/access.list", "--data", "/mosquitto/data")
    config = printed_config(capsys, "config", *where, *of)
    assert (ROOT / folder / "mosquitto.conf").read_text() == config
    assert (ROOT / folder / "access.list").read_text() == printed_config(capsys, "access", *of)
    assert "require_certificate true" in config


def test_demo_and_locked_pipeline_differ_in_access_control_only() -> None:
    demo, locked = (tomllib.loads((ROOT / folder / "street.toml").read_text()) for folder in (CONFIG, LOCKED))
    assert locked.pop("site") == [{"name": "local", "broker": "mqtts://broker:8883", "cameras": ["door"]}]
    assert demo.pop("site") == [{"name": "local", "broker": "mqtt://broker:1883"}]
    assert demo == locked


def test_swarm_services_have_only_the_secrets_of_their_identity() -> None:
    stack = parsed(STACKS[0])
    pipeline = load_pipeline(ROOT / LOCKED / "street.toml")
    identities = {stage.name: stage_username(pipeline, stage) for stage in pipeline.stage}
    identities |= {"gateway": source_username(pipeline), "monitor": MONITOR, "broker": broker_username("local")}
    files = ("ca.crt", "tls.crt", "tls.key")
    for name, identity in identities.items():
        service = stack["services"][name]
        folder = "/mosquitto/certs/" if name == "broker" else ""
        assert [each["source"] for each in service["secrets"]] == [f"{identity}.{file}" for file in files]
        assert [each["target"] for each in service["secrets"]] == [f"{folder}{file}" for file in files]
        assert {each["mode"] for each in service["secrets"]} == {0o400}
        assert name == "broker" or service["environment"] == {"SPARSE_TLS": "/run/secrets"}
    assert set(stack["secrets"]) == {f"{identity}.{file}" for identity in identities.values() for file in files}


def test_demo_pipeline_names_the_stages_of_the_services() -> None:
    pipeline = load_pipeline(CONFIG / "street.toml")
    stages = {stage.name for stage in pipeline.stage}
    assert stages == {"head", "body", "tail"} == OURS - {"gateway", "monitor"}
    assert pipeline.source.keep == "all"


def test_images_have_pinned_versions() -> None:
    versions = {image.partition(":")[0]: set[str]() for image in images()}
    for image in images():
        versions[image.partition(":")[0]].add(image.partition(":")[2])
    kustomized = {"sparse": {""}}  # in a patch; kustomization.yaml has its version
    assert {name: tags - kustomized.get(name, set()) for name, tags in versions.items()} == {
        "python": {"3.11-slim-bookworm"},
        "sparse": {version()},
        "eclipse-mosquitto": {"2.0.22"},
        "influxdb": {"2.7.12"},
        "chronograf": {"1.10.7"},
        "grafana/grafana": {"12.0.1"},
    }


def version() -> str:
    text: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return text


@pytest.mark.parametrize("path", [COMPOSE, STACKS[0]], ids=["compose", "swarm"])
def test_containers_of_sparse_and_the_broker_have_limited_privileges(path: Path) -> None:
    services = parsed(path)["services"]
    assert set(services) >= OURS | {"broker"}
    for name in OURS | {"broker"}:
        service = services[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("mem_limit") or service["deploy"]["resources"]["limits"]["memory"], name
        assert "container_name" not in service, f"{name} could not be scaled"
    for name in OURS:
        assert services[name]["stop_grace_period"] == "30s", name


@pytest.mark.parametrize("path", [COMPOSE, STACKS[1]], ids=["compose", "swarm"])
def test_containers_of_telemetry_have_limited_privileges(path: Path) -> None:
    services = parsed(path)["services"]
    for name in TELEMETRY - {"influxdb"}:  # starts as root and drops its privileges itself
        service = services[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("mem_limit") or service["deploy"]["resources"]["limits"]["memory"], name
        assert name == "recorder" or service["user"].partition(":")[0] not in ("", "0", "root"), name


def test_services_outside_the_telemetry_profile_need_no_secret() -> None:
    services = parsed(COMPOSE)["services"]
    assert {name for name, service in services.items() if service.get("profiles") == ["telemetry"]} == TELEMETRY
    assert {name for name, service in services.items() if "secrets" in service} == TELEMETRY
    for name in OURS | {"broker"}:
        assert "SPARSE_INFLUX_URL" not in services[name].get("environment", {}), name
        assert TELEMETRY.isdisjoint(services[name].get("depends_on", {})), name


@pytest.mark.parametrize("path", [COMPOSE, STACKS[1]], ids=["compose", "swarm"])
def test_recorder_and_senders_share_one_telemetry_socket(path: Path) -> None:
    services = parsed(path)["services"]
    socket = Path(services["recorder"]["environment"]["SPARSE_MONITOR"])
    for name in WITH_TELEMETRY | {"recorder"}:
        environment = services[name]["environment"]
        assert environment["SPARSE_MONITOR"] == str(socket), name
        assert environment["SPARSE_RUN"] == "${SPARSE_RUN:-street}", name
        assert mounts(services[name])[str(socket.parent)] == "sockets", name
    # A second monitor at that path would replace the socket.
    assert "SPARSE_MONITOR" not in services.get("monitor", {}).get("environment", {})


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Sources of mounts by target, in either notation."""
    sources: dict[str, str] = {}
    for volume in service["volumes"]:
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
            sources[target] = source
        else:
            sources[volume["target"]] = volume.get("source", "")
    return sources


def test_compose_and_swarm_configure_telemetry_alike() -> None:
    demo, stack = (parsed(path)["services"] for path in (COMPOSE, STACKS[1]))
    for name in TELEMETRY:
        environment = stack[name]["environment"]
        locks = {"SPARSE_TLS": "/run/secrets"} if name == "recorder" else {}
        assert environment == {**demo[name]["environment"], **locks}, name
        assert stack[name].get("entrypoint") == demo[name].get("entrypoint"), name


def test_compose_and_swarm_mount_the_configured_dashboards() -> None:
    demo, stack = (parsed(path)["services"] for path in (COMPOSE, STACKS[1]))
    configs = parsed(STACKS[1])["configs"]
    for name in ("chronograf", "grafana"):
        in_demo = {
            f"{target}/{file.relative_to(ROOT / source)}": file
            for target, source in mounts(demo[name]).items()
            if source.startswith("./")
            for file in repository_files(f"{source}/*")
        }
        in_stack = {
            config["target"]: (STACKS[1].parent / configs[config["source"]]["file"]).resolve()
            for config in stack[name]["configs"]
        }
        assert in_stack == in_demo
    home_dashboard = demo["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    provider = parsed(ROOT / "deploy/grafana/provisioning/dashboards/sparse.yaml")["providers"][0]
    assert str(Path(home_dashboard).parent) == provider["options"]["path"]
    assert demo["chronograf"]["environment"]["RESOURCES_PATH"] in mounts(demo["chronograf"])


def test_grafana_reads_the_bucket_that_the_recorder_writes() -> None:
    [source] = parsed(ROOT / "deploy/grafana/provisioning/datasources/sparse.yaml")["datasources"]
    environment = parsed(COMPOSE)["services"]["recorder"]["environment"]
    assert {"type": source["type"], "uid": source["uid"]} == DATASOURCE
    assert source["url"] == environment["SPARSE_INFLUX_URL"]
    assert source["jsonData"]["dbName"] == environment["SPARSE_INFLUX_BUCKET"]
    assert DIALECT.database_prefix == f'"{environment["SPARSE_INFLUX_BUCKET"]}"..'


def test_files_contain_no_secrets() -> None:
    for path in [COMPOSE, *STACKS]:
        for name, service in parsed(path)["services"].items():
            for variable in service.get("environment", {}):
                secret = re.search("TOKEN|PASSWORD|SECRET", variable)
                assert not secret or variable.endswith("_FILE"), f"{path.name}: {name}: {variable}"


def test_demo_ports_are_bound_to_localhost() -> None:
    for name, service in parsed(COMPOSE)["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("${SPARSE_BIND:-127.0.0.1}:"), f"{name}: {port}"
