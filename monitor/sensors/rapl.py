"""Energy of processors by their own counters (RAPL), from Linux's powercap files."""

from __future__ import annotations

from pathlib import Path

from monitor.points.points import TelemetryPoint
from monitor.sensors.base import Sensor
from monitor.sensors.counters import MonotonicCounter

# AMD's zones have these names too. `intel-rapl-mmio:*` is left out: it reads the same counters another way.
_ZONES = "sys/class/powercap/intel-rapl:*"
_ROOT_ONLY = "only root may read energy_uj, since Linux 5.10"


class _Zone:
    """One zone, which is the power rail `rail`."""

    def __init__(self, folder: Path, rail: str) -> None:
        self.rail = rail
        self._file = folder / "energy_uj"
        self._counter = MonotonicCounter(_range_uj(folder))
        self._last_s = 0.0

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """Its point, from the second sample on; raises `OSError` or `ValueError`."""
        energy_uj = self._counter.increase(int(self._file.read_text()))
        elapsed_s = now_s - self._last_s
        self._last_s = now_s
        if energy_uj is None or elapsed_s <= 0:
            return []
        energy_j = energy_uj / 1e6
        fields = {"power_w": energy_j / elapsed_s, "energy_j": energy_j}
        return [TelemetryPoint("power", time_ns, {"rail": self.rail}, fields)]


class RaplSensor(Sensor):
    """The measurement `power`: a point for each zone, from the second sample on. `root` replaces `/`.

    Additive rails (`monitor.sensors.counters`) are `package-0` for each processor and `dram-0` for its memory, which
    the package does not include. `package-0/core` and `package-0/uncore` are parts of a package; `board/psys`, which
    few boards have, includes the packages. A zone that cannot be read is not retried.
    """

    name = "rapl"

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__()
        self._root = root
        self._zones: list[_Zone] | None = None  # None: not yet searched

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points, and reports of zones that cannot be read."""
        points: list[TelemetryPoint] = []
        if self._zones is None:
            self._zones = _find_zones(self._root)
            if not self._zones:
                points += self.report_missing(time_ns, "", f"there is no /{_ZONES}")
        for zone in list(self._zones):
            try:
                points += zone.sample(time_ns, now_s)
            except PermissionError:
                self._zones.remove(zone)
                points += self.report_missing(time_ns, "", _ROOT_ONLY)
            except (OSError, ValueError) as error:
                self._zones.remove(zone)
                points += self.report_missing(time_ns, zone.rail, error)
        return points


def _find_zones(root: Path) -> list[_Zone]:
    names: dict[str, str] = {}  # zone name by folder name
    for folder in sorted(root.glob(_ZONES)):
        try:
            names[folder.name] = (folder / "name").read_text().strip()
        except OSError:
            continue
    parent = root.joinpath(_ZONES).parent
    return [_Zone(parent / folder, _rail(folder, name, names)) for folder, name in names.items()]


def _rail(folder: str, name: str, names: dict[str, str]) -> str:
    package = names.get(folder.rpartition(":")[0])
    if package is None:
        return f"board/{name}" if name.startswith("psys") else name
    if name == "dram":
        return f"dram-{package.removeprefix('package-')}"
    return f"{package}/{name}"


def _range_uj(folder: Path) -> int | None:
    try:
        return int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return None
