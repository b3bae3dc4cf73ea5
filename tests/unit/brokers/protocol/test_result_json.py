"""Results as JSON: detections, classes and values; metadata that does not fit its tensors raises `BadPayload`."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import BadPayload, WireError
from brokers.protocol.messages import BinaryContent, TensorContent
from brokers.protocol.result_json import content_to_dict, encode_json, timing_to_dict
from brokers.protocol.safetensors_codec import TensorView, from_numpy
from brokers.protocol.stage_timing import Hop
from tests.unit.brokers.protocol.strategies import tensor_views

HOPS = (Hop("head", "head-1", 1.00049, 0.5, 10.0, 0.25, 10, 20, 4), Hop("tail", "tail-1", 2.0, 0.0, 3.0, 0.0))


def detections(scores: list[float], boxes: list[list[float]], **metadata: str) -> TensorContent:
    tensors = {
        "scores": from_numpy(np.array(scores, np.float32)),
        "boxes": from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
    }
    return TensorContent(tensors, {"format": "detections", "picture": "640x272", "labels": '["dog"]', **metadata})


def strict_json(result: dict[str, Any]) -> Any:
    """Encode and parse again, with a parser that accepts neither NaN nor infinity."""
    return json.loads(encode_json(result), parse_constant=pytest.fail)


def test_detections_become_objects_in_pixels() -> None:
    assert content_to_dict(detections([0.98768], [[1.04, 2, 3, 4.06]])) == {
        "picture": {"width": 640, "height": 272},
        "objects": [{"label": "dog", "score": 0.9877, "box": [1.0, 2.0, 3.0, 4.1]}],
    }


def test_no_detections_become_an_empty_list() -> None:
    assert content_to_dict(detections([], [], labels="[]"))["objects"] == []


def test_classes_become_labels_with_scores() -> None:
    body = TensorContent(
        {"scores": from_numpy(np.array([0.75, 0.25]))}, {"format": "classes", "labels": '["cat", "dog"]'}
    )
    assert content_to_dict(body) == {"classes": [{"label": "cat", "score": 0.75}, {"label": "dog", "score": 0.25}]}


def test_other_tensors_become_values_up_to_a_size() -> None:
    tensors = {
        "mean": from_numpy(np.array(1.5)),
        "flags": from_numpy(np.array([[True], [False]])),
        "edge": from_numpy(np.zeros(4096, np.uint8)),
        "large": from_numpy(np.zeros((4097, 1), np.float32)),
        "waves": from_numpy(np.zeros(2, np.complex64)),
        "half": TensorView("BF16", (2,), memoryview(b"\xc0\x3f\x00\x40")),
        "tiny": TensorView("F8_E4M3", (2,), memoryview(b"..")),
        "tinier": TensorView("F4", (2,), memoryview(b".")),
    }
    values = content_to_dict(TensorContent(tensors))["values"]
    assert values["edge"] == [0] * 4096
    del values["edge"]
    assert values == {
        "mean": 1.5,
        "flags": [[True], [False]],
        "large": {"dtype": "F32", "shape": [4097, 1]},
        "waves": {"dtype": "C64", "shape": [2]},
        "half": [1.5, 2.0],
        "tiny": {"dtype": "F8_E4M3", "shape": [2]},
        "tinier": {"dtype": "F4", "shape": [2]},
    }


def test_binary_content_becomes_type_and_size() -> None:
    assert content_to_dict(BinaryContent("image/png", b"12345")) == {"content_type": "image/png", "bytes": 5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_become_null(value: float) -> None:
    assert strict_json(content_to_dict(TensorContent({"x": from_numpy(np.array([1.0, value]))}))) == {
        "values": {"x": [1.0, None]}
    }
    assert strict_json(content_to_dict(TensorContent({"x": from_numpy(np.array(value, np.float16))}))) == {
        "values": {"x": None}
    }
    [detection] = strict_json(content_to_dict(detections([value], [[value, 1, 2, 3]])))["objects"]
    assert detection == {"label": "dog", "score": None, "box": [None, 1, 2, 3]}


def test_network_time_is_the_rest_of_the_round_trip() -> None:
    assert timing_to_dict(HOPS[:1]) == {
        "stages": [
            {
                "stage": "head",
                "worker": "head-1",
                "queue_ms": 1.0,
                "decode_ms": 0.5,
                "compute_ms": 10.0,
                "encode_ms": 0.25,
            }
        ]
    }
    assert timing_to_dict(HOPS, 20.0)["network_ms"] == 3.25
    assert [stage["stage"] for stage in timing_to_dict(HOPS, 20.0)["stages"]] == ["head", "tail"]
    assert timing_to_dict(HOPS, 1.0)["network_ms"] == 0.0  # a stage's clock may run fast


WRONG_METADATA: dict[str, dict[str, str]] = {
    "a picture without sizes": {"picture": "large"},
    "half a picture": {"picture": "640x"},
    "no labels": {"labels": ""},
    "labels that are not JSON": {"labels": "dog"},
    "labels that are a text": {"labels": '"d"'},
    "labels that are numbers": {"labels": "[1]"},
    "labels too many": {"labels": '["dog", "cat"]'},
    "labels too few": {"labels": "[]"},
    "deep labels": {"labels": "[" * 100_000},
}


@pytest.mark.parametrize("case", WRONG_METADATA)
def test_metadata_that_does_not_fit_raises_bad_payload(case: str) -> None:
    with pytest.raises(BadPayload, match="metadata does not fit its tensors"):
        content_to_dict(detections([0.5], [[1, 2, 3, 4]], **WRONG_METADATA[case]))


def test_more_boxes_than_scores_raise_bad_payload() -> None:
    with pytest.raises(BadPayload):
        content_to_dict(detections([0.5], [[1, 2, 3, 4], [1, 2, 3, 4]]))


@pytest.mark.parametrize("name", ["scores", "boxes"])
@pytest.mark.parametrize("replacement", [None, np.zeros(()), np.zeros((1, 2, 3)), np.zeros(2, np.complex64)], ids=repr)
def test_missing_or_misshapen_tensors_raise_bad_payload(name: str, replacement: Any) -> None:
    body = detections([0.5], [[1, 2, 3, 4]])
    tensors = {key: tensor for key, tensor in body.tensors.items() if key != name}
    if replacement is not None:
        tensors[name] = from_numpy(replacement)
    with pytest.raises(BadPayload):
        content_to_dict(TensorContent(tensors, body.metadata))


@given(
    st.dictionaries(st.sampled_from(["scores", "boxes", "x"]), tensor_views()),
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from(["detections", "classes", "poem"]),
            "labels": st.sampled_from(["[]", '["a"]', '["a","b"]', "{}", "1"]) | st.text(max_size=5),
            "picture": st.sampled_from(["1x1", "x"]) | st.text(max_size=5),
        },
    ),
)
def test_any_content_converts_or_raises_wire_error(tensors: dict[str, TensorView], metadata: dict[str, str]) -> None:
    with contextlib.suppress(WireError):
        strict_json(content_to_dict(TensorContent(tensors, metadata)))
