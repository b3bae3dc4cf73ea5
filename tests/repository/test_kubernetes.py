"""deploy/kubernetes as kubectl renders it: checked against the schemas of the Kubernetes API.

KEDA's ScaledObject has no such schema: its fields are checked one by one, by KEDA's documentation.
"""

from __future__ import annotations

import functools
import json
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from brokers.config.pipeline_file import load_pipeline
from brokers.security.acl import MONITOR, broker_username, source_username, stage_username
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency

# The oldest version that clouds still run, and the newest with schemas.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
SITES = ("cloudlet", "cloud")
FOLDERS = ("base", "gpu", "scaled", *(f"sites/{site}" for site in SITES))
STAGES = ("head", "body", "tail")
WORKLOAD_KINDS = ("Deployment", "StatefulSet")
KEDA = "keda.sh/v1alpha1"
LIVENESS_TIMEOUT_S = 300  # an outage of the broker of a minute, or a slow start, must not restart all workers

Resource = dict[str, Any]


@functools.cache
def _kustomize(folder: str) -> str:
    command = [str(require_dependency("kubectl")), "kustomize", str(ROOT / "deploy/kubernetes" / folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
    return result.stdout


def render(folder: str) -> list[Resource]:
    return list(yaml.safe_load_all(_kustomize(folder)))


def render_workloads(folder: str) -> dict[str, Resource]:
    return {resource["metadata"]["name"]: resource for resource in render(folder) if resource["kind"] in WORKLOAD_KINDS}


def container_of(workload: Resource) -> Resource:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_resources_match_their_schemas(folder: str, version: str) -> None:
    resources = [resource for resource in render(folder) if resource["apiVersion"] != KEDA]
    assert len(resources) >= 9
    for resource in resources:
        kubernetes_validate.validate(resource, version, strict=True)


def test_unknown_field_fails_validation() -> None:
    (body,) = (resource for resource in render("base") if resource["metadata"]["name"] == "body")
    body["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(body, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", ["gateway", *STAGES])
def test_probes_use_the_liveness_file(name: str) -> None:
    container = container_of(render_workloads("base")[name])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == ["healthy"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["periodSeconds"] * container[probe]["failureThreshold"] >= LIVENESS_TIMEOUT_S


def test_containers_are_unprivileged_and_limited() -> None:
    workloads = render_workloads("base")
    assert set(workloads) == {"broker", "gateway", "monitor", *STAGES}
    for name, workload in workloads.items():
        pod = workload["spec"]["template"]["spec"]
        container = container_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert container["resources"]["limits"]["memory"], name
        assert ":" in container["image"], name
        if name != "broker":
            assert pod["terminationGracePeriodSeconds"] == 30, name


@pytest.mark.parametrize(
    ("folder", "site", "file"),
    [
        ("base", "local", "deploy/locked/street.toml"),
        *((f"sites/{site}", site, "deploy/kubernetes/sites/pipeline/street.toml") for site in SITES),
    ],
)
def test_each_workload_has_the_secret_of_its_identity(folder: str, site: str, file: str) -> None:
    pipeline = load_pipeline(ROOT / file)
    identities = {stage.name: stage_username(pipeline, stage) for stage in pipeline.stage}
    identities |= {"gateway": source_username(pipeline), "monitor": MONITOR, "broker": broker_username(site)}
    for name, workload in render_workloads(folder).items():
        volumes = workload["spec"]["template"]["spec"]["volumes"]
        (volume,) = (each for each in volumes if "secret" in each)
        assert volume["secret"] == {"secretName": identities[name], "defaultMode": 0o440}, name
        container = container_of(workload)
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == volume["name"])
        assert mount["readOnly"] is True
        environment = {each["name"]: each["value"] for each in container.get("env", [])}
        assert mount["mountPath"] == environment.get("SPARSE_TLS", "/mosquitto/certs")
        broker = pipeline.configured_broker(site) if name == "monitor" else None
        assert environment.get("SPARSE_BROKER") == broker


def test_changed_configuration_replaces_the_pods() -> None:
    """The name of a ConfigMap contains a hash of its contents."""
    names = [resource["metadata"]["name"] for resource in render("base") if resource["kind"] == "ConfigMap"]
    assert len(names) == 2
    for workload in render_workloads("base").values():
        for volume in workload["spec"]["template"]["spec"].get("volumes", []):
            assert "configMap" not in volume or volume["configMap"]["name"] in names


def test_each_site_has_a_broker_and_its_own_stages() -> None:
    workloads = {site: render_workloads(f"sites/{site}") for site in SITES}
    assert set(workloads["cloudlet"]) == {"broker", "gateway", "head", "monitor"}
    assert set(workloads["cloud"]) == {"broker", "body", "tail", "monitor"}
    for site in SITES:
        for workload in workloads[site].values():
            assert workload["metadata"]["namespace"] == site
            assert workload["spec"]["template"]["spec"]["nodeSelector"] == {"site": site}


def test_heavy_stages_have_one_gpu_each() -> None:
    limits = {name: container_of(each)["resources"]["limits"] for name, each in render_workloads("gpu").items()}
    assert {name for name, limit in limits.items() if limit.get("nvidia.com/gpu") == 1} == {"body", "tail"}


def test_stages_scale_by_the_queueing_time_of_the_monitor() -> None:
    resources = render("scaled")
    scaled = [resource for resource in resources if resource["apiVersion"] == KEDA]
    services = {resource["metadata"]["name"] for resource in resources if resource["kind"] == "Service"}
    pipeline = load_pipeline(ROOT / "deploy/config/street.toml")
    assert {resource["metadata"]["name"] for resource in scaled} == {"body", "tail"}
    assert "monitor" in services
    for resource in scaled:
        stage = resource["spec"]["scaleTargetRef"]["name"]
        assert stage in render_workloads("scaled")
        (trigger,) = resource["spec"]["triggers"]
        metadata = trigger["metadata"]
        assert (trigger["type"], trigger["metricType"]) == ("metrics-api", "Value")
        assert metadata["valueLocation"] == f"{pipeline.name}.{stage}.queue_ms"
        assert metadata["url"] == f"http://monitor.{resource['metadata']['namespace']}.svc:9100/stages"
        assert all(isinstance(value, str) for value in metadata.values()), json.dumps(metadata)
