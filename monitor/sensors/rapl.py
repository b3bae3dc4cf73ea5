"""Energy of processors by their own counters (RAPL), from Linux's powercap files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from monitor.sensors.base import Reading, Sensor, read_number, read_text
from monitor.sensors.counters import MonotonicCounter

# AMD's zones have these names too. `intel-rapl-mmio:*` is left out: it reads the same counters another way.
_ZONES = "sys/class/powercap/intel-rapl:*"
_ROOT_ONLY = "only root may read energy_uj, since Linux 5.10"


@dataclass(slots=True)
class _Zone:
    """One zone, which is the power rail `rail`; the counter is in microjoules."""

    rail: str
    file: Path
    counter: MonotonicCounter


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
        self._last_s = 0.0

    def measure(self, now_s: float) -> Iterator[Reading]:
        """The readings, and reports of zones that cannot be read."""
        if self._zones is None:
            self._zones = _find_zones(self._root)
            if not self._zones:
                yield from self.report_missing("", f"there is no /{_ZONES}")
        elapsed_s = now_s - self._last_s
        self._last_s = now_s
        for zone in list(self._zones):
            try:
                energy_uj = zone.counter.increase(int(zone.file.read_text()))
            except (OSError, ValueError) as error:
                self._zones.remove(zone)
                root_only = isinstance(error, PermissionError)
                yield from self.report_missing("", _ROOT_ONLY) if root_only else self.report_missing(zone.rail, error)
                continue
            if energy_uj is not None and elapsed_s > 0:
                energy_j = energy_uj / 1e6
                yield "power", {"rail": zone.rail}, {"power_w": energy_j / elapsed_s, "energy_j": energy_j}


def _find_zones(root: Path) -> list[_Zone]:
    folders = {folder.name: folder for folder in sorted(root.glob(_ZONES))}
    names = {key: name for key, folder in folders.items() if (name := read_text(folder / "name"))}
    return [
        _Zone(
            _rail(key, name, names),
            folders[key] / "energy_uj",
            MonotonicCounter(read_number(folders[key] / "max_energy_range_uj")),
        )
        for key, name in names.items()
    ]


def _rail(folder: str, name: str, names: dict[str, str]) -> str:
    package = names.get(folder.rpartition(":")[0])
    if package is None:
        return f"board/{name}" if name.startswith("psys") else name
    if name == "dram":
        return f"dram-{package.removeprefix('package-')}"
    return f"{package}/{name}"
