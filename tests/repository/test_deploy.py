"""The files of deploy/ and docker-compose.yml: what they say twice they say alike, and nothing in them floats."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from brokers.cli import main
from brokers.config.pipeline_file import load_pipeline
from brokers.security.principals import MONITOR, broker_username, source_username, stage_username
from deploy.dashboards.chronograf import DIALECT
from deploy.dashboards.grafana import DATASOURCE
from tests.support.environment.checkout import ROOT, repository_files

SITES = "deploy/kubernetes/sites"
CONFIG = ROOT / "deploy/config"
LOCKED = "deploy/locked"
COMPOSE = ROOT / "docker-compose.yml"
STACKS = [ROOT / "deploy/swarm/stack.yml", ROOT / "deploy/swarm/telemetry.yml"]
OURS = {"gateway", "head", "body", "tail", "monitor"}
TELLING = OURS - {"monitor"}  # who has a monitor to tell what it does
TELEMETRY = {"recorder", "influxdb", "chronograf", "grafana"}


def parsed(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def images() -> list[str]:
    """Every image that a file of deploy/, or the compose file, names."""
    found: list[str] = []
    for path in [
        COMPOSE,
        *repository_files("deploy/*.yml"),
        *repository_files("deploy/*.yaml"),
        ROOT / "deploy/Dockerfile",
    ]:
        named = re.findall(r"^\s*(?:image: |ARG BASE=)(\S+)$", path.read_text(), re.MULTILINE)
        found += [re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", image) for image in named]
    return found


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["broker", *command]) == 0
    return capsys.readouterr().out


def test_the_demos_broker_is_configured_as_the_project_prints(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("config", "--open", "--data", "/mosquitto/data", str(CONFIG / "street.toml"), "local")
    assert (CONFIG / "mosquitto.conf").read_text() == printed(capsys, *given)


@pytest.mark.parametrize(
    ("pipeline", "site", "kept"),
    [
        (f"{LOCKED}/street.toml", "local", LOCKED),
        (f"{SITES}/pipeline/street.toml", "cloudlet", f"{SITES}/cloudlet"),
        (f"{SITES}/pipeline/street.toml", "cloud", f"{SITES}/cloud"),
    ],
    ids=["local", "cloudlet", "cloud"],
)
def test_every_other_broker_is_locked_as_the_project_prints(
    pipeline: str, site: str, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of = (str(ROOT / pipeline), site)
    where = ("--certs", "/mosquitto/certs", "--access", "/mosquitto/config/access.list", "--data", "/mosquitto/data")
    config = printed(capsys, "config", *where, *of)
    assert (ROOT / kept / "mosquitto.conf").read_text() == config
    assert (ROOT / kept / "access.list").read_text() == printed(capsys, "access", *of)
    assert "require_certificate true" in config


def test_the_pipeline_of_the_demo_and_the_locked_one_differ_in_their_locks_only() -> None:
    demo, locked = (tomllib.loads((ROOT / folder / "street.toml").read_text()) for folder in (CONFIG, LOCKED))
    assert locked.pop("site") == [{"name": "local", "broker": "mqtts://broker:8883", "cameras": ["door"]}]
    assert demo.pop("site") == [{"name": "local", "broker": "mqtt://broker:1883"}]
    assert demo == locked


def test_each_service_of_the_swarm_has_the_secrets_of_its_identity_and_no_other() -> None:
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


def test_the_pipeline_is_one_that_loads_and_names_the_stages_that_are_started() -> None:
    pipeline = load_pipeline(CONFIG / "street.toml")
    stages = {stage.name for stage in pipeline.stage}
    assert stages == {"head", "body", "tail"} == OURS - {"gateway", "monitor"}
    assert pipeline.source.keep == "all"


def test_every_image_has_a_version() -> None:
    versions = {image.partition(":")[0]: set[str]() for image in images()}
    for image in images():
        versions[image.partition(":")[0]].add(image.partition(":")[2])
    kustomized = {"sparse": {""}}  # a patch names it without, and kustomization.yaml gives it its version
    assert {name: tags - kustomized.get(name, set()) for name, tags in versions.items()} == {
        "python": {"3.11-slim-bookworm"},
        "sparse": {version()},
        "eclipse-mosquitto": {"2.0.22"},
        "influxdb": {"2.7.12"},
        "chronograf": {"1.10.7"},
        "grafana/grafana": {"12.0.1"},
    }


def version() -> str:
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return found


@pytest.mark.parametrize("path", [COMPOSE, STACKS[0]], ids=["compose", "swarm"])
def test_every_container_of_ours_and_the_broker_is_locked_down(path: Path) -> None:
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
def test_telemetry_is_locked_down_as_well(path: Path) -> None:
    services = parsed(path)["services"]
    for name in TELEMETRY - {"influxdb"}:  # which begins as root, and chooses an account by itself
        service = services[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("mem_limit") or service["deploy"]["resources"]["limits"]["memory"], name
        assert name == "recorder" or service["user"].partition(":")[0] not in ("", "0", "root"), name


def test_without_the_profile_no_service_needs_a_secret() -> None:
    services = parsed(COMPOSE)["services"]
    assert {name for name, service in services.items() if service.get("profiles") == ["telemetry"]} == TELEMETRY
    assert {name for name, service in services.items() if "secrets" in service} == TELEMETRY
    for name in OURS | {"broker"}:
        assert "SPARSE_INFLUX_URL" not in services[name].get("environment", {}), name
        assert TELEMETRY.isdisjoint(services[name].get("depends_on", {})), name


@pytest.mark.parametrize("path", [COMPOSE, STACKS[1]], ids=["compose", "swarm"])
def test_the_recorder_listens_where_the_others_tell(path: Path) -> None:
    services = parsed(path)["services"]
    socket = Path(services["recorder"]["environment"]["SPARSE_MONITOR"])
    for name in TELLING | {"recorder"}:
        told = services[name]["environment"]
        assert told["SPARSE_MONITOR"] == str(socket), name
        assert told["SPARSE_RUN"] == "${SPARSE_RUN:-street}", name
        assert mounts(services[name])[str(socket.parent)] == "sockets", name
    # Another monitor there would take the socket from it.
    assert "SPARSE_MONITOR" not in services.get("monitor", {}).get("environment", {})


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Sources of mounts by target, in either notation."""
    found: dict[str, str] = {}
    for volume in service["volumes"]:
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
            found[target] = source
        else:
            found[volume["target"]] = volume.get("source", "")
    return found


def test_telemetry_is_set_up_alike_by_compose_and_by_swarm() -> None:
    demo, stack = (parsed(path)["services"] for path in (COMPOSE, STACKS[1]))
    for name in TELEMETRY:
        own = {**stack[name]["environment"]}
        locks = {"SPARSE_TLS": "/run/secrets"} if name == "recorder" else {}
        assert own == {**demo[name]["environment"], **locks}, name
        assert stack[name].get("entrypoint") == demo[name].get("entrypoint"), name


def test_both_files_mount_the_dashboards_where_they_are_looked_for() -> None:
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
    looked = demo["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    provider = parsed(ROOT / "deploy/grafana/provisioning/dashboards/sparse.yaml")["providers"][0]
    assert str(Path(looked).parent) == provider["options"]["path"]
    assert demo["chronograf"]["environment"]["RESOURCES_PATH"] in mounts(demo["chronograf"])


def test_grafanas_source_is_the_one_that_its_dashboard_asks_and_the_bucket_that_is_written_to() -> None:
    [source] = parsed(ROOT / "deploy/grafana/provisioning/datasources/sparse.yaml")["datasources"]
    written = parsed(COMPOSE)["services"]["recorder"]["environment"]
    assert {"type": source["type"], "uid": source["uid"]} == DATASOURCE
    assert source["url"] == written["SPARSE_INFLUX_URL"]
    assert source["jsonData"]["dbName"] == written["SPARSE_INFLUX_BUCKET"]
    assert DIALECT.database_prefix == f'"{written["SPARSE_INFLUX_BUCKET"]}"..'


def test_no_secret_stands_in_a_file() -> None:
    for path in [COMPOSE, *STACKS]:
        for name, service in parsed(path)["services"].items():
            for variable in service.get("environment", {}):
                secret = re.search("TOKEN|PASSWORD|SECRET", variable)
                assert not secret or variable.endswith("_FILE"), f"{path.name}: {name}: {variable}"


def test_the_demo_is_open_to_this_machine_only() -> None:
    for name, service in parsed(COMPOSE)["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("${SPARSE_BIND:-127.0.0.1}:"), f"{name}: {port}"
