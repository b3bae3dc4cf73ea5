"""Real databases for telemetry: InfluxDB 1.6 with a door like that of later ones, and VictoriaMetrics.

Debian's InfluxDB is 1.6, which has no `/api/v2/write`: nginx in front of it makes `/write` of it, as InfluxDB 1.8 does
by itself, and looks at the token, which 1.6 does not know. Each server is a process of the test's own on a free port,
with a folder of its own; it can be ended and started again with what it has.
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
    """One server: started, ended by a signal, started again."""

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
        """What starts it, in the foreground."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it answers."""

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(f"{type(self).__name__} to answer", self._up)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Returns when it is gone."""
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait(60)
            self._process = None

    def _up(self) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"it ended with {status}: {(self.folder / 'log').read_text()[-2000:]}"
        try:
            return self.is_ready()
        except OSError:
            return False


class InfluxServer(DatabaseServer):
    """InfluxDB 1.6. Clients come in by its door, which is another process: `end` ends the database only."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rpc_port = free_port()
        self.proxy = NginxProxy(folder / "door", self.port)

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
        """The series of an answer, past nginx and all code of ours."""
        body = urllib.parse.urlencode({"q": influxql, "db": bucket, "epoch": "ns"}).encode()
        with urllib.request.urlopen(f"{self.url}/query", data=body, timeout=30) as answer:
            [result] = json.load(answer)["results"]
        assert "error" not in result, result
        found: list[dict[str, Any]] = result.get("series", [])
        return found

    def count_points(self, measurement: str, field: str) -> int:
        """How many points have that field."""
        found = self.query(f'SELECT count("{field}") FROM "{measurement}"')
        return int(found[0]["values"][0][1]) if found else 0


class NginxProxy(DatabaseServer):
    """nginx, which makes an InfluxDB 1.6 look like a later one."""

    def __init__(self, folder: Path, upstream_port: int) -> None:
        super().__init__(folder)
        self.upstream_port = upstream_port
        self.token = TOKEN  # that it wants, from its next start on

    def command(self) -> list[str | Path]:
        path = self.folder / "nginx.conf"
        refusal = '{"code":"unauthorized","message":"unauthorized access"}'  # as InfluxDB 2 says it
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
        location = /door {{ return 204; }}
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
        asked = urllib.request.Request(f"{self.url}/door", headers={"Authorization": f"Token {self.token}"})
        with urllib.request.urlopen(asked, timeout=5):
            return True


class VictoriaMetricsServer(DatabaseServer):
    """VictoriaMetrics, which keeps numbers only, and counts milliseconds."""

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
            pass  # what came in this second is not found without
        asked = urllib.parse.urlencode({"match[]": name, "reduce_mem_usage": "1"})
        with urllib.request.urlopen(f"{self.url}/api/v1/export?{asked}", timeout=30) as answer:
            series = [json.loads(line) for line in answer.read().splitlines()]
        return [
            (each["metric"], time_ms, value)
            for each in series
            for time_ms, value in zip(each["timestamps"], each["values"], strict=True)
        ]


@contextmanager
def start_servers(*servers: DatabaseServer) -> Iterator[None]:
    """The servers, started; all ended by their ids."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.stop(signal.SIGKILL)


@contextmanager
def start_influx(folder: Path) -> Iterator[InfluxServer]:
    """An InfluxDB with an empty bucket, and its door."""
    found = InfluxServer(folder)
    with start_servers(found, found.proxy):
        yield found


@contextmanager
def start_victoria_metrics(folder: Path) -> Iterator[VictoriaMetricsServer]:
    """A VictoriaMetrics without anything."""
    found = VictoriaMetricsServer(folder)
    with start_servers(found):
        yield found
