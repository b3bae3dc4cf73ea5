"""Databases for telemetry: InfluxDB 1.6 behind a proxy, and VictoriaMetrics.

Debian's InfluxDB is 1.6, which has no `/api/v2/write`: an nginx proxy maps it to `/write`, as InfluxDB 1.8 does, and
checks the token, which 1.6 does not support. Each server is a process at a free port with its own folder; it can be
stopped, and started again with its data.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monitor.stores.influx.config import InfluxTarget
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import eventually

TOKEN = "a-token-for-tests"
BUCKET = "sparse"


class DatabaseServer(ABC):
    """A server that can be started, stopped by a signal, and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def target(self) -> InfluxTarget:
        return InfluxTarget(self.url, bucket=BUCKET, token=TOKEN)

    @abstractmethod
    def command(self) -> list[str | Path]:
        """The command that starts it in the foreground."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it responds; raises `OSError` if it does not."""

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(f"{type(self).__name__} to respond", self._is_up)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Stop the server, and wait for its exit."""
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait(60)
            self._process = None

    def _is_up(self) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"it exited with status {status}: {(self.folder / 'log').read_text()[-2000:]}"
        try:
            return self.is_ready()
        except OSError:
            return False


class InfluxServer(DatabaseServer):
    """InfluxDB 1.6. Clients connect to its proxy, another process, which `stop` does not stop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rpc_port = free_port()
        self.proxy = NginxProxy(folder / "proxy", self.port)

    @property
    def target(self) -> InfluxTarget:
        return self.proxy.target

    def command(self) -> list[str | Path]:
        path = self.folder / "influxdb.conf"
        path.write_text(
            f"""reporting-disabled = true
bind-address = "127.0.0.1:{self.rpc_port}"
[meta]
dir = "{self.folder}/meta"
[data]
dir = "{self.folder}/data"
wal-dir = "{self.folder}/wal"
query-log-enabled = false
[monitor]
store-enabled = false
[http]
bind-address = "127.0.0.1:{self.port}"
log-enabled = false
"""
        )
        return [require_dependency("influxd"), "run", "-config", path]

    def is_ready(self) -> bool:
        self.query(f'CREATE DATABASE "{BUCKET}"')
        return True

    def query(self, influxql: str, bucket: str = BUCKET) -> list[dict[str, Any]]:
        """The series of a query, without the proxy and the code of Sparse."""
        body = urllib.parse.urlencode({"q": influxql, "db": bucket, "epoch": "ns"}).encode()
        with urllib.request.urlopen(f"{self.url}/query", data=body, timeout=30) as response:
            [result] = json.load(response)["results"]
        assert "error" not in result, result
        series: list[dict[str, Any]] = result.get("series", [])
        return series

    def count_points(self, measurement: str, field: str) -> int:
        """The number of points with this field."""
        series = self.query(f'SELECT count("{field}") FROM "{measurement}"')
        return int(series[0]["values"][0][1]) if series else 0


class NginxProxy(DatabaseServer):
    """nginx, which gives InfluxDB 1.6 the write API and the tokens of later versions."""

    def __init__(self, folder: Path, upstream_port: int) -> None:
        super().__init__(folder)
        self.upstream_port = upstream_port
        self.token = TOKEN  # the token that it accepts, from its next start on

    def command(self) -> list[str | Path]:
        path = self.folder / "nginx.conf"
        refusal = '{"code":"unauthorized","message":"unauthorized access"}'  # the body of InfluxDB 2
        user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
        temporary = "\n".join(
            f"{kind}_temp_path {self.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        path.write_text(
            f"""daemon off; master_process off; {user} pid {self.folder}/pid; error_log stderr;
events {{}}
http {{
    access_log off; client_max_body_size 25m; {temporary}
    server {{
        listen 127.0.0.1:{self.port};
        if ($http_authorization != "Token {self.token}") {{ return 401 '{refusal}'; }}
        proxy_set_header Authorization "";
        location = /health {{ return 204; }}
        location = /api/v2/write {{
            rewrite ^ /write?db=$arg_bucket&precision=n? break;
            proxy_pass http://127.0.0.1:{self.upstream_port};
        }}
        location = /query {{ proxy_pass http://127.0.0.1:{self.upstream_port}; }}
    }}
}}
"""
        )
        return [require_dependency("nginx"), "-e", "stderr", "-c", path]

    def is_ready(self) -> bool:
        request = urllib.request.Request(f"{self.url}/health", headers={"Authorization": f"Token {self.token}"})
        with urllib.request.urlopen(request, timeout=5):
            return True


class VictoriaMetricsServer(DatabaseServer):
    """VictoriaMetrics, which stores numbers only, with times in milliseconds."""

    def command(self) -> list[str | Path]:
        return [
            require_dependency("victoria-metrics"),
            *(f"-httpListenAddr=127.0.0.1:{self.port}", f"-storageDataPath={self.folder}/data"),
            *("-loggerLevel=ERROR", "-memory.allowedBytes=256MiB", "-storage.minFreeDiskSpaceBytes=1MB"),
        ]

    def is_ready(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/health", timeout=5):
            return True

    def export_samples(self, name: str) -> list[tuple[dict[str, str], int, float]]:
        """All samples of a metric, such as `batch_tasks`: labels, milliseconds, value."""
        with urllib.request.urlopen(f"{self.url}/internal/force_flush", timeout=30):
            pass  # samples of the last second cannot be read before
        query = urllib.parse.urlencode({"match[]": name, "reduce_mem_usage": "1"})
        with urllib.request.urlopen(f"{self.url}/api/v1/export?{query}", timeout=30) as response:
            series = [json.loads(line) for line in response.read().splitlines()]
        return [
            (each["metric"], time_ms, value)
            for each in series
            for time_ms, value in zip(each["timestamps"], each["values"], strict=True)
        ]


@contextmanager
def start_servers(*servers: DatabaseServer) -> Iterator[None]:
    """Start servers, and kill them at the end of the block."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.stop(signal.SIGKILL)


@contextmanager
def start_influx(folder: Path) -> Iterator[InfluxServer]:
    """Start an InfluxDB with an empty bucket, and its proxy."""
    server = InfluxServer(folder)
    with start_servers(server, server.proxy):
        yield server


@contextmanager
def start_victoria_metrics(folder: Path) -> Iterator[VictoriaMetricsServer]:
    """Start an empty VictoriaMetrics."""
    server = VictoriaMetricsServer(folder)
    with start_servers(server):
        yield server
