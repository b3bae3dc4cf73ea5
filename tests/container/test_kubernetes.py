"""deploy/kubernetes, rendered by kubectl: held against the schemas of Kubernetes' API, since there is no cluster here.

KEDA's ScaledObject is none of them: what it must have is written down here, by KEDA's documentation.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from brokers.config.pipeline_file import load_pipeline
from brokers.security.principals import MONITOR, broker_username, source_username, stage_username
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency

# The oldest that its makers still mend, or that clouds still run, to the newest whose schemas are at hand.
VERSIONS = ("1.31", "1.33", kubernetes_validate.latest_version())
SITES = ("cloudlet", "cloud")
FOLDERS = ("base", "gpu", "scaled", *(f"sites/{site}" for site in SITES))
STAGES = ("head", "body", "tail")
KINDS = ("Deployment", "StatefulSet")
KEDA = "keda.sh/v1alpha1"

Resource = dict[str, Any]


def rendered(folder: str) -> list[Resource]:
    command = [str(require_dependency("kubectl")), "kustomize", str(ROOT / "deploy/kubernetes" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


def workloads(folder: str) -> dict[str, Resource]:
    return {each["metadata"]["name"]: each for each in rendered(folder) if each["kind"] in KINDS}


def container_of(deployment: Resource) -> Resource:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_resource_fits_its_schema(folder: str, version: str) -> None:
    checked = 0
    for resource in rendered(folder):
        if resource["apiVersion"] != KEDA:
            kubernetes_validate.validate(resource, version, strict=True)
            checked += 1
    assert checked >= 9


def test_a_field_that_does_not_exist_would_be_found() -> None:
    (body,) = (each for each in rendered("base") if each["metadata"]["name"] == "body")
    body["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(body, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", ["gateway", *STAGES])
def test_what_works_is_started_watched_and_restarted_by_its_pulse(name: str) -> None:
    container = container_of(workloads("base")[name])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == ["healthy"]
    patience_s = container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"]
    assert patience_s >= 300, "a broker that is away for a minute is no reason to restart all workers"


def test_every_container_is_locked_down_and_bounded() -> None:
    found = workloads("base")
    assert set(found) == {"broker", "gateway", "monitor", *STAGES}
    for name, deployment in found.items():
        pod = deployment["spec"]["template"]["spec"]
        container = container_of(deployment)
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
def test_each_has_the_secret_of_its_own_identity_and_comes_to_the_locked_broker(
    folder: str, site: str, file: str
) -> None:
    pipeline = load_pipeline(ROOT / file)
    identities = {stage.name: stage_username(pipeline, stage) for stage in pipeline.stage}
    identities |= {"gateway": source_username(pipeline), "monitor": MONITOR, "broker": broker_username(site)}
    for name, workload in workloads(folder).items():
        (volume,) = (each for each in workload["spec"]["template"]["spec"]["volumes"] if "secret" in each)
        assert volume["secret"] == {"secretName": identities[name], "defaultMode": 0o440}, name
        container = container_of(workload)
        (mounted,) = (each for each in container["volumeMounts"] if each["name"] == volume["name"])
        assert mounted["readOnly"] is True
        given = {each["name"]: each["value"] for each in container.get("env", [])}
        assert mounted["mountPath"] == given.get("SPARSE_TLS", "/mosquitto/certs")
        assert given.get("SPARSE_BROKER") == (pipeline.configured_broker(site) if name == "monitor" else None)


def test_a_configuration_that_changes_has_another_name_so_that_pods_are_replaced() -> None:
    names = [each["metadata"]["name"] for each in rendered("base") if each["kind"] == "ConfigMap"]
    assert len(names) == 2
    for deployment in workloads("base").values():
        for volume in deployment["spec"]["template"]["spec"].get("volumes", []):
            assert "configMap" not in volume or volume["configMap"]["name"] in names


def test_each_site_has_a_broker_and_its_own_stages_on_its_own_nodes() -> None:
    found = {site: workloads(f"sites/{site}") for site in SITES}
    assert set(found["cloudlet"]) == {"broker", "gateway", "head", "monitor"}
    assert set(found["cloud"]) == {"broker", "body", "tail", "monitor"}
    for site, parts in found.items():
        for part in parts.values():
            assert part["metadata"]["namespace"] == site
            assert part["spec"]["template"]["spec"]["nodeSelector"] == {"site": site}


def test_the_heavy_stages_have_a_gpu_each() -> None:
    limits = {name: container_of(each)["resources"]["limits"] for name, each in workloads("gpu").items()}
    assert {name for name, limit in limits.items() if limit.get("nvidia.com/gpu") == 1} == {"body", "tail"}


def test_stages_scale_by_what_the_monitor_says_of_their_queues() -> None:
    scaled = [each for each in rendered("scaled") if each["apiVersion"] == KEDA]
    pipeline = load_pipeline(ROOT / "deploy/config/street.toml")
    services = {each["metadata"]["name"] for each in rendered("scaled") if each["kind"] == "Service"}
    assert {each["metadata"]["name"] for each in scaled} == {"body", "tail"}
    for each in scaled:
        stage = each["spec"]["scaleTargetRef"]["name"]
        assert stage in workloads("scaled")
        (trigger,) = each["spec"]["triggers"]
        metadata = trigger["metadata"]
        assert (trigger["type"], trigger["metricType"]) == ("metrics-api", "Value")
        assert metadata["valueLocation"] == f"{pipeline.name}.{stage}.queue_ms"
        assert metadata["url"] == f"http://monitor.{each['metadata']['namespace']}.svc:9100/stages"
        assert "monitor" in services
        assert all(isinstance(value, str) for value in metadata.values()), json.dumps(metadata)
