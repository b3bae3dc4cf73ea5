"""What processors draw, as they count it themselves (RAPL): Linux has a file for each zone."""

from __future__ import annotations

from pathlib import Path

from monitor.points.points import TelemetryPoint
from monitor.sensors.base import UnavailableSensors, error_reason
from monitor.sensors.counters import MonotonicCounter

# Not `intel-rapl-mmio:*`: another way to the very same counters. AMD's processors are called so, too.
_ZONES = "sys/class/powercap/intel-rapl:*"
_ROOT_ONLY = "only root may read energy_uj, since Linux 5.10"


class _Zone:
    """`rail` is its name as a tag."""

    def __init__(self, folder: Path, rail: str) -> None:
        self.rail = rail
        self._file = folder / "energy_uj"
        # Read once: without it, a value that goes back is one that nobody understands.
        self._counter = MonotonicCounter(_range_uj(folder))
        self._last_s = 0.0

    def look(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """Its point, from the second look on; raises `OSError` or `ValueError`."""
        energy_uj = self._counter.delta(int(self._file.read_text()))
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        if energy_uj is None or elapsed_s <= 0:
            return []
        energy_j = energy_uj / 1e6
        return [
            TelemetryPoint(
                "power", time_ns, {"rail": self.rail}, {"power_w": energy_j / elapsed_s, "energy_j": energy_j}
            )
        ]


class RaplSensor:
    """The measurement `power`: one point for each zone, from the second sample on. `root` stands in for `/`.

    Rails that make up the node's total (`monitor.sensors.counters.is_additive`): `package-0`, one for each processor, and `dram-0`,
    its memory, which the package does not count. `package-0/core` and `package-0/uncore` are parts of a package;
    `board/psys` is all of the board, packages included, on the few that have it. A zone that cannot be read is not
    tried again.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._zones: list[_Zone] | None = None  # None: not looked for yet
        self._missing = UnavailableSensors()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points, and what cannot be read."""
        points: list[TelemetryPoint] = []
        if self._zones is None:
            self._zones = _zones(self._root)
            if not self._zones:
                points += self._missing.report_once(time_ns, "rapl", f"there is no /{_ZONES}")
        for zone in list(self._zones):
            try:
                points += zone.look(time_ns, now_s)
            except PermissionError:
                self._zones.remove(zone)
                points += self._missing.report_once(time_ns, "rapl", _ROOT_ONLY)
            except (OSError, ValueError) as error:
                self._zones.remove(zone)
                points += self._missing.report_once(time_ns, f"rapl.{zone.rail}", error_reason(error))
        return points

    def close(self) -> None:
        """Nothing is held."""


def _zones(root: Path) -> list[_Zone]:
    names: dict[str, str] = {}  # by folder
    for folder in sorted(root.glob(_ZONES)):
        try:
            names[folder.name] = (folder / "name").read_text().strip()
        except OSError:
            continue
    parent = root.joinpath(_ZONES).parent
    return [_Zone(parent / folder, _rail(folder, name, names)) for folder, name in names.items()]


def _rail(folder: str, name: str, names: dict[str, str]) -> str:
    outer = names.get(folder.rpartition(":")[0])
    if outer is None:
        return f"board/{name}" if name.startswith("psys") else name
    if name == "dram":
        return f"dram-{outer.removeprefix('package-')}"
    return f"{outer}/{name}"


def _range_uj(folder: Path) -> int | None:
    try:
        return int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return None
