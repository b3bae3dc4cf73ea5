"""A detector behind the ingress gateway: photographs from a client that uses MQTT 3.1.1, valid and malformed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from brokers.errors import SparseError
from brokers.protocol.safetensors_codec import from_numpy, pack
from stages.loading.weights_file import find_weights
from tests.support.environment.external_programs import require_dependency, skip_or_fail
from tests.support.pipelines.ingress_pipeline import IngressPipeline
from tests.support.pipelines.pipeline_files import write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually, process_sandbox

# What the original Darknet finds in this photograph: tests/unit/stages/models/test_yolo_postprocess.py.
DOG_SCORE = 0.564
DOG_BOX = np.array([129.1, 186.7, 369.3, 517.5])  # left, top, right, bottom, in pixels


@pytest.fixture(scope="module", name="detector_sandbox")
def _detector_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path_factory.mktemp("ingress")) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", name="detector")
def _detector(detector_sandbox: ProcessSandbox) -> IngressPipeline:
    require_dependency("darknet-files")
    try:
        find_weights("yolov3-tiny")
    except SparseError as error:
        skip_or_fail(str(error))
    folder = detector_sandbox.folder
    stages, source = [{"name": "all", "max_batch": 2}], {"kind": "ingress"}
    path = write_pipeline_file(folder, stages, source, name="door", model="yolov3-tiny", weights="yolov3-tiny")
    return IngressPipeline(detector_sandbox, path, "--json", "--out", str(folder / "out"), kind="mosquitto")


def photograph() -> bytes:
    """Darknet's photograph of a dog, a bicycle and a car, 768 x 576, as JPEG."""
    return (require_dependency("darknet-files") / "data" / "dog.jpg").read_bytes()


def encode(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def find_dog(result: dict[str, Any]) -> dict[str, Any]:
    (dog,) = [item for item in result["objects"] if item["label"] == "dog"]
    return dict(dog)


def corners(item: dict[str, Any]) -> list[float]:
    left, top, width, height = item["box"]
    return [left, top, left + width, top + height]


def test_jpeg_returns_labels_scores_and_boxes(detector: IngressPipeline) -> None:
    result = detector.request("front", photograph())
    dog = find_dog(result)
    assert dog["score"] == pytest.approx(DOG_SCORE, abs=0.02)
    assert corners(dog) == pytest.approx(DOG_BOX, abs=2)
    assert result["picture"] == {"width": 768, "height": 576}
    assert (result["source"], result["pipeline"]) == ("front", "door")
    assert len(bytes.fromhex(result["request"])) == 16
    assert result["age_ms"] >= result["latency_ms"] > 0
    (timing,) = result["time"]["stages"]
    assert (timing["stage"], timing["worker"]) == ("all", "all-1")
    assert timing["compute_ms"] > 0
    assert result["time"]["network_ms"] >= 0


def test_png_and_pixels_return_the_same(detector: IngressPipeline) -> None:
    image = Image.open(io.BytesIO(photograph()))
    pixels = b"".join(bytes(piece) for piece in pack({"picture": from_numpy(np.asarray(image))}, {}))
    for source, payload in (("png", encode(image, "PNG")), ("pixels", pixels)):
        dog = find_dog(detector.request(source, payload))
        assert dog["score"] == pytest.approx(DOG_SCORE, abs=0.02)
        assert corners(dog) == pytest.approx(DOG_BOX, abs=2)


def test_boxes_of_a_large_picture_are_in_its_pixels(detector: IngressPipeline) -> None:
    """20 megapixels: several chunks, and at the limit of what the decoder accepts by default."""
    large = Image.open(io.BytesIO(photograph())).resize((5472, 4104))
    result = detector.request("large", encode(large, "JPEG"))
    assert result["picture"] == {"width": 5472, "height": 4104}
    # Scaling up changes the pixels that the network gets: the box moves by some of its cells.
    assert corners(find_dog(result)) == pytest.approx(DOG_BOX * 5472 / 768, abs=0.05 * 5472)


_HEADER = b'{"x":{"dtype":"F32","shape":[25000000000],"data_offsets":[0,100000000000]}}'
MALFORMED: dict[str, tuple[bytes, str, str]] = {
    "no-jpeg": (b"\xff\xd8\xff\xe0 text", "BadPayload", "image/jpeg"),
    "bytes": (b"\x00\x01\x02\x03", "BadPayload", "expected JPEG, PNG, safetensors or JSON"),
    "empty": (b"", "BadPayload", "expected JPEG, PNG, safetensors or JSON"),
    "reading": (b'{"celsius": 21.5}', "BadPayload", "accepts pictures"),
    "oversized": (len(_HEADER).to_bytes(8, "little") + _HEADER, "Truncated", "100000000000 bytes"),
}


def test_malformed_payloads_get_one_failure_each(detector: IngressPipeline) -> None:
    payloads = {**MALFORMED, "truncated": (photograph()[:20_000], "BadPayload", "image/jpeg")}
    for source, (payload, _, _) in payloads.items():
        detector.publish(source, payload)
    assert find_dog(detector.request("valid", photograph()))
    for source, (_, error, reason) in payloads.items():
        (result,) = eventually(f"the failure of {source}", lambda source=source: detector.results(source))  # type: ignore[misc]
        assert result["error"] == error
        assert reason in result["reason"]


def test_failures_are_counted_in_the_presence_record(
    detector: IngressPipeline, detector_sandbox: ProcessSandbox
) -> None:
    detector.request("counted", b"\xff\xd8\xff\xe0 text")

    def read_worker() -> dict[str, Any]:
        result = detector_sandbox.run_sparse("status", "--broker", detector.address, "--json")
        (worker,) = result.json_output["workers"]
        return dict(worker)

    def is_counted() -> Any:
        load = read_worker()["load"]
        results = detector.results()
        failed = sum("error" in result and result.get("stage") == "all" for result in results)
        done = sum("objects" in result for result in results) + failed
        return failed and (load["done"], load["failed"]) == (done, failed)

    eventually("the counters", is_counted)
    assert read_worker()["formats"] == ["application/x-safetensors", "image/jpeg", "image/png"]


def test_stopped_gateway_prints_its_summary(detector: IngressPipeline, detector_sandbox: ProcessSandbox) -> None:
    """The last test of this file: it stops the detector."""
    summary = detector.interrupt().json_output
    assert summary["requests"] == summary["results"] + summary["failed"]
    assert summary["lost"] == 0
    assert summary["failures"]["BadPayload"] >= 3
    lines = (detector_sandbox.folder / "out" / "results.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == summary["requests"]
