"""What a monitor's HTTP server answers, asked with the standard library's client."""

from __future__ import annotations

import http.client
import json
from typing import Any

from tests.support.monitor.prometheus_text import SeriesValues, parse_exposition

_PATIENCE_S = 10.0


def http_get(port: int, path: str) -> tuple[int, str, str]:
    """Status, content type and body; status 0 where nobody listens."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    try:
        line.request("GET", path)
        answer = line.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()
    except ConnectionError:
        return 0, "", ""
    finally:
        line.close()


def fetch_metrics(port: int) -> SeriesValues:
    """All that /metrics has."""
    status, kind, text = http_get(port, "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return parse_exposition(text)


def fetch_stages(port: int) -> dict[str, dict[str, dict[str, Any]]]:
    """All that /stages has."""
    status, kind, text = http_get(port, "/stages")
    assert (status, kind) == (200, "application/json"), text
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return found
