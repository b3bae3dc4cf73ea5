"""Contents of requests and results with one number."""

from __future__ import annotations

import numpy as np

from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from sources.client.pending_request import PendingRequest


def make_content(value: float) -> TensorContent:
    return TensorContent({"values": from_numpy(np.array(value))})


def result_value(request: PendingRequest) -> float:
    content = request.result.content
    assert isinstance(content, TensorContent)
    return float(to_numpy(content.tensors["values"]))
