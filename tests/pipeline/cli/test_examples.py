"""The examples do what their first lines say."""

from __future__ import annotations

import json
import re
import sys
import tomllib

import pytest

from brokers.config.pipeline_file import load_pipeline
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.ingress_pipeline import IngressPipeline
from tests.support.pipelines.processes import ProcessSandbox

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.toml")))
def test_every_pipeline_file_is_one_and_names_itself(name: str) -> None:
    load_pipeline(EXAMPLES / name)
    commands = re.findall(r"^#     (.+)$", (EXAMPLES / name).read_text(), flags=re.MULTILINE)
    assert all(command.split()[0] in ("sparse", "mosquitto_sub", "mosquitto_pub") for command in commands)
    assert [line for line in commands if line.startswith("sparse")] in ([], [f"sparse run examples/{name}"])


def test_the_sensor_filter_and_the_python_way_in(sandbox: ProcessSandbox) -> None:
    path = EXAMPLES / "sensor.toml"
    (publish,) = re.findall(r"^#     (mosquitto_pub .+)$", path.read_text(), flags=re.MULTILINE)
    gateway = IngressPipeline(sandbox, path, "--json", "--out", str(sandbox.folder / "out"))

    first = gateway.publish_and_wait(publish)
    assert (first["source"], first["values"]) == ("kitchen", {"celsius": 21.5, "outliers": 0, "alarm": False})
    for celsius in (21.6, 21.4, 21.5, 21.6):
        gateway.request("kitchen", {"celsius": celsius})
    before = gateway.request("kitchen", {"celsius": 21.5})["values"]
    # One wild reading changes nothing; a lasting change is one.
    assert gateway.request("kitchen", {"celsius": 85.0})["values"] == {**before, "outliers": 1}
    assert before["celsius"] == pytest.approx(21.5, abs=0.1)
    warm = [gateway.request("sauna", {"celsius": celsius})["values"]["alarm"] for celsius in (29.0, 35.0, 35.0)]
    assert warm == [False, True, True]
    several = gateway.request("series", {"celsius": [20.0, 22.0, 22.0]})["values"]
    assert several == {"celsius": 21.5, "outliers": 0, "alarm": False}

    refused = gateway.request("kitchen", {"celsius": "warm"})
    assert (refused["error"], refused["stage"]) == ("BadPayload", "calm")
    for nothing in ({"celsius": None}, {}, {"fahrenheit": 70}):
        assert gateway.request("nothing", nothing)["error"] == "BadPayload"

    lacks = "expected ['celsius', 'outliers'], ['celsius'] missing from ['fahrenheit', 'outliers']"
    said = sandbox.start(sys.executable, EXAMPLES / "offload.py", gateway.address).wait()
    assert said.returncode == 0, said.stderr
    one, many, *rest = said.stdout.splitlines()
    assert one == "one: 21.5 degrees, alarm: False"
    # A filter remembers: a request that had to be sent again, on a busy machine, counts twice in the hundredths.
    assert re.fullmatch(r"many: 50 results, the last is 39\.6\d degrees", many)
    assert rest == [
        f"failed: stage 'alarm' says payload of type tensors: {lacks}",
        "late: 0.01 ms are not enough",
    ]

    answer = gateway.start_client("mosquitto_rr -t sparse/local/sensor/calm/tasks -e answers/mine -m 21 -W 20").wait()
    assert '"error": "BadPayload"' in answer.stdout  # a bare number, and the stage `alarm` wants to know of what
    asked = "mosquitto_rr -t sparse/local/sensor/calm/tasks -e answers/mine -W 20 -m"
    answer = gateway.start_client(f"""{asked} '{{"celsius": 21}}'""").wait()
    assert '"values": {"celsius": 21.0, "outliers": 0, "alarm": false}' in answer.stdout
    summary = gateway.interrupt().json_output
    assert summary["lost"] == 0
    results = [json.loads(line) for line in (sandbox.folder / "out" / "results.jsonl").read_text().splitlines()]
    failed = [result["source"] for result in results if "error" in result]
    assert summary["failures"] == {"BadPayload": len(failed)}
    assert len([source for source in failed if source != "greeting"]) == 4  # the greeting is the test's, and no reading


def test_the_detector_behind_the_door_is_that_of_the_street() -> None:
    """tests/pipeline/inference/test_ingress.py runs one in a single stage, which takes less time."""
    street, door = (tomllib.loads((EXAMPLES / f"{name}.toml").read_text()) for name in ("street", "ingress"))
    assert door["source"] == {"kind": "ingress"}
    assert door["pipeline"] == {**street["pipeline"], "name": "door"}
    assert door["stage"] == street["stage"]
