"""The pipeline files and programs in examples/ work with the commands in their first lines."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from typing import Any

import pytest

from brokers.config.pipeline_file import load_pipeline
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.ingress_pipeline import IngressPipeline
from tests.support.pipelines.processes import ProcessSandbox

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.toml")))
def test_example_is_a_pipeline_file_with_its_command(name: str) -> None:
    load_pipeline(EXAMPLES / name)
    commands = re.findall(r"^#     (.+)$", (EXAMPLES / name).read_text(), flags=re.MULTILINE)
    assert all(command.split()[0] in ("sparse", "mosquitto_sub", "mosquitto_pub") for command in commands)
    assert [line for line in commands if line.startswith("sparse")] in ([], [f"sparse run examples/{name}"])


def test_sensor_example_serves_mqtt_clients_and_python(sandbox: ProcessSandbox) -> None:
    path = EXAMPLES / "sensor.toml"
    (command,) = re.findall(r"^#     (mosquitto_pub .+)$", path.read_text(), flags=re.MULTILINE)
    pipeline = IngressPipeline(sandbox, path, "--json", "--out", str(sandbox.folder / "out"))

    first = pipeline.run_and_wait(command)
    assert (first["source"], first["values"]) == ("kitchen", {"celsius": 21.5, "outliers": 0, "alarm": False})
    for celsius in (21.6, 21.4, 21.5, 21.6):
        pipeline.request("kitchen", {"celsius": celsius})
    before = pipeline.request("kitchen", {"celsius": 21.5})["values"]
    assert before["celsius"] == pytest.approx(21.5, abs=0.1)
    # One outlier changes nothing; a lasting change does.
    assert pipeline.request("kitchen", {"celsius": 85.0})["values"] == {**before, "outliers": 1}
    alarms = [pipeline.request("sauna", {"celsius": celsius})["values"]["alarm"] for celsius in (29.0, 35.0, 35.0)]
    assert alarms == [False, True, True]
    several = pipeline.request("series", {"celsius": [20.0, 22.0, 22.0]})["values"]
    assert several == {"celsius": 21.5, "outliers": 0, "alarm": False}

    malformed: tuple[dict[str, Any], ...] = ({"celsius": "warm"}, {"celsius": None}, {}, {"fahrenheit": 70})
    for reading in malformed:
        assert pipeline.request("malformed", reading)["error"] == "BadPayload"

    program = sandbox.start(sys.executable, EXAMPLES / "offload.py", pipeline.address).wait()
    assert program.returncode == 0, program.stderr
    one, many, failed, late = program.stdout.splitlines()
    assert one == "one: 21.5 degrees, alarm: False"
    # The stage is a filter with a state: on a busy machine, requests that are repeated change the second decimal.
    assert re.fullmatch(r"many: 50 results, the last is 39\.6\d degrees", many)
    assert failed.startswith("failed: stage 'alarm' ")
    assert "'celsius'" in failed
    assert late == "late: 0.01 ms are not enough"

    task_client = "mosquitto_rr -t sparse/local/sensor/calm/tasks -e answers/mine -W 60 -m"
    assert '"error": "BadPayload"' in pipeline.start_client(f"{task_client} 21").wait().stdout
    result = pipeline.start_client(f"""{task_client} '{{"celsius": 21}}'""").wait().stdout
    assert '"values": {"celsius": 21.0, "outliers": 0, "alarm": false}' in result
    summary = pipeline.interrupt().json_output
    assert summary["lost"] == 0
    results = [json.loads(line) for line in (sandbox.folder / "out" / "results.jsonl").read_text().splitlines()]
    failures = [result["source"] for result in results if "error" in result]
    assert summary["failures"] == {"BadPayload": len(failures)}
    assert failures.count("malformed") == len(malformed)


def test_ingress_example_has_the_detector_of_the_street_example() -> None:
    """tests/pipeline/inference/test_ingress.py runs a detector in one stage, which takes less time."""
    street, ingress = (tomllib.loads((EXAMPLES / f"{name}.toml").read_text()) for name in ("street", "ingress"))
    assert ingress["source"] == {"kind": "ingress"}
    assert ingress["pipeline"] == {**street["pipeline"], "name": "door"}
    assert ingress["stage"] == street["stage"]
