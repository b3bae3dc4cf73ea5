"""A Jetson's rails, by its INA3221 monitors, and the load of its GPU, which NVML does not know on most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.sensors.base import UnavailableSensors, error_reason
from monitor.sensors.counters import EnergyIntegrator

# L4T from release 34 on has the kernel's own driver; older ones have NVIDIA's, whose folder has been called
# `iio_device` and `iio:device0`.
_HWMON = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[123]_label"
_IIO = "sys/bus/i2c/drivers/ina3221x/*/iio*/rail_name_[012]"
# Where releases have the GPU's load, in thousandths: the first that is there. A chip's own folder is called after its
# address.
_LOADS = (
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
    "sys/devices/*.g[pvau]*/load",
    "sys/class/devfreq/*.g[pvau]*/device/load",
)
_INPUTS = ("VDD_IN", "POM_5V_IN", "5V_IN")  # what the whole module draws, where a board has it
_NOT_CONNECTED = ("", "NC")
_CARRIER = ("0042", "0043")  # addresses of the monitors on the carrier boards of TX1 and TX2


@dataclass(slots=True)
class _Rail:
    name: str
    read_w: Callable[[], float]
    integral: EnergyIntegrator = field(default_factory=EnergyIntegrator)


class JetsonSensor:
    """The measurements `power` and `gpu` of a Jetson; on anything else nothing, and nothing is missing.

    Rails that make up the node's total (`monitor.sensors.counters.is_additive`): `VDD_IN` (the module; `POM_5V_IN` on a Nano), whose
    others are then `VDD_IN/VDD_SOC` and so on; on a board without such a rail (AGX) all of the module.
    `carrier/VDD_MUX` is of the carrier board. Energy is power over time. A read takes about a millisecond: it goes
    through I2C. `root` stands in for `/`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._rails: list[_Rail] | None = None  # None: not looked for yet
        self._load: Path | None = None
        self._model = ""
        self._missing = UnavailableSensors()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points, and what cannot be read."""
        points = self._begin(time_ns) if self._rails is None else []
        for rail in self._rails or ():
            power_w: float | None = None
            try:
                power_w = rail.read_w()
            except (OSError, ValueError) as error:
                points += self._missing.report_once(time_ns, f"jetson.{rail.name}", error_reason(error))
            energy_j = rail.integral.delta_j(power_w, now_s)
            if power_w is not None:
                points.append(
                    TelemetryPoint("power", time_ns, {"rail": rail.name}, {"power_w": power_w, "energy_j": energy_j})
                )
        return points + self._gpu(time_ns)

    def close(self) -> None:
        """Nothing is held."""

    def _begin(self, time_ns: int) -> list[TelemetryPoint]:
        self._rails = []
        if not _is_jetson(self._root):
            return []
        self._rails = _rails(self._root)
        self._load = next((path for pattern in _LOADS for path in sorted(self._root.glob(pattern))), None)
        self._model = _text(self._root / "proc/device-tree/model")
        missing: list[TelemetryPoint] = []
        if not self._rails:
            missing += self._missing.report_once(time_ns, "jetson", "there is no INA3221 in /sys/bus/i2c/drivers")
        if self._load is None:
            missing += self._missing.report_once(
                time_ns, "jetson.gpu", f"there is no /{_LOADS[0]}, nor where others have it"
            )
        return missing

    def _gpu(self, time_ns: int) -> list[TelemetryPoint]:
        if self._load is None:
            return []
        try:
            use = int(self._load.read_text()) / 1000
        except (OSError, ValueError) as error:
            return self._missing.report_once(time_ns, "jetson.gpu", error_reason(error))
        # Its memory is the node's, its power a rail's.
        fields: dict[str, FieldValue] = {"use": use, "memory_used_bytes": None, "memory_total_bytes": None}
        fields |= {"temperature_c": None, "power_w": None, "energy_j": None}
        return [TelemetryPoint("gpu", time_ns, {"gpu": "jetson", "model": self._model}, fields)]


def _is_jetson(root: Path) -> bool:
    return "nvidia,tegra" in _text(root / "proc/device-tree/compatible") or (root / "etc/nv_tegra_release").exists()


def _rails(root: Path) -> list[_Rail]:
    found: dict[tuple[str, int], tuple[str, Callable[[], float]]] = {}  # by the monitor's address and channel
    for address, channel, label, read_w in _channels(root):
        if label not in _NOT_CONNECTED:
            found.setdefault((address, channel), (label, read_w))
    whole = next((label for name in _INPUTS for label, _ in found.values() if label == name), None)
    rails = []
    for (address, _), (label, read_w) in found.items():
        inner = f"{whole}/{label}" if whole and label != whole else label
        rails.append(_Rail(f"carrier/{label}" if address.endswith(_CARRIER) else inner, read_w))
    return rails


def _channels(root: Path) -> Iterator[tuple[str, int, str, Callable[[], float]]]:
    for path in sorted(root.glob(_HWMON)):
        channel = int(path.name[2])
        yield path.parents[2].name, channel, _text(path), _hwmon(path.parent, channel)
    for path in sorted(root.glob(_IIO)):
        channel = int(path.name.rpartition("_")[2])
        yield path.parents[1].name, channel + 1, _text(path), _iio(path.parent, channel)


def _hwmon(folder: Path, channel: int) -> Callable[[], float]:
    current, voltage = folder / f"curr{channel}_input", folder / f"in{channel}_input"  # mA, mV
    return lambda: int(current.read_text()) * int(voltage.read_text()) / 1e6


def _iio(folder: Path, channel: int) -> Callable[[], float]:
    power = folder / f"in_power{channel}_input"  # mW
    return lambda: int(power.read_text()) / 1e3


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""
