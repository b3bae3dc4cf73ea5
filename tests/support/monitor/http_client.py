"""A client of the monitor's HTTP server."""

from __future__ import annotations

import http.client
import json
from typing import Any

from tests.support.monitor.prometheus_series import SeriesValues, parse_exposition

_TIMEOUT_S = 60.0


def http_get(port: int, path: str) -> tuple[int, str, str]:
    """Status, content type and body; status 0 if the connection is refused or closed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read().decode()
    except ConnectionError:
        return 0, "", ""
    finally:
        connection.close()


def fetch_metrics(port: int) -> SeriesValues:
    """All series of /metrics."""
    status, content_type, text = http_get(port, "/metrics")
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return parse_exposition(text)


def fetch_stages(port: int) -> dict[str, dict[str, dict[str, Any]]]:
    """The JSON object of /stages."""
    status, content_type, text = http_get(port, "/stages")
    assert (status, content_type) == (200, "application/json"), text
    stages: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return stages
