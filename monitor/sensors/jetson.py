"""NVIDIA Jetson: power rails from the INA3221 monitors, and the GPU load, which NVML lacks on most Jetsons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from monitor.points.points import TelemetryPoint
from monitor.sensors.base import Sensor
from monitor.sensors.counters import EnergyIntegrator

# Jetson Linux (L4T) uses the kernel's own driver from release 34 on, and NVIDIA's before, whose folder is named
# `iio_device` or `iio:device0`.
_HWMON = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[123]_label"
_IIO = "sys/bus/i2c/drivers/ina3221x/*/iio*/rail_name_[012]"
# The GPU load in thousandths, by release; the first file found is used. Folder names may contain the chip's address.
_LOADS = (
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
    "sys/devices/*.g[pvau]*/load",
    "sys/class/devfreq/*.g[pvau]*/device/load",
)
_MODULE_INPUTS = ("VDD_IN", "POM_5V_IN", "5V_IN")  # rails that supply the whole module, where a board has one
_NOT_CONNECTED = ("", "NC")
_CARRIER_ADDRESSES = ("0042", "0043")  # monitors on the carrier boards of TX1 and TX2


@dataclass(slots=True)
class _Rail:
    name: str
    read_w: Callable[[], float]
    integrator: EnergyIntegrator = field(default_factory=EnergyIntegrator)


class JetsonSensor(Sensor):
    """The measurements `power` and `gpu` of a Jetson; no points and no reports on other machines.

    Additive rails (`monitor.sensors.counters`) are `VDD_IN`, the module's input (`POM_5V_IN` on a Nano), whose parts
    are then named `VDD_IN/VDD_SOC` and so on; on a board without an input rail (AGX), all rails of the module.
    `carrier/VDD_MUX` is of the carrier board. Energy is power integrated over time. One read takes about a millisecond
    (I2C). `root` replaces `/`.
    """

    name = "jetson"

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__()
        self._root = root
        self._rails: list[_Rail] | None = None  # None: not yet searched
        self._load: Path | None = None
        self._model = ""

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points, and reports of values that cannot be read."""
        points = self._find(time_ns) if self._rails is None else []
        for rail in self._rails or ():
            power_w: float | None = None
            try:
                power_w = rail.read_w()
            except (OSError, ValueError) as error:
                points += self.report_missing(time_ns, rail.name, error)
            energy_j = rail.integrator.increase_j(power_w, now_s)
            if power_w is not None:
                fields = {"power_w": power_w, "energy_j": energy_j}
                points.append(TelemetryPoint("power", time_ns, {"rail": rail.name}, fields))
        return points + self._gpu(time_ns)

    def _find(self, time_ns: int) -> list[TelemetryPoint]:
        self._rails = []
        if not _is_jetson(self._root):
            return []
        self._rails = _find_rails(self._root)
        self._load = next((path for pattern in _LOADS for path in sorted(self._root.glob(pattern))), None)
        self._model = _read_text(self._root / "proc/device-tree/model")
        missing: list[TelemetryPoint] = []
        if not self._rails:
            missing += self.report_missing(time_ns, "", "there is no INA3221 in /sys/bus/i2c/drivers")
        if self._load is None:
            reason = f"there is neither /{_LOADS[0]} nor a file for the load of another release"
            missing += self.report_missing(time_ns, "gpu", reason)
        return missing

    def _gpu(self, time_ns: int) -> list[TelemetryPoint]:
        if self._load is None:
            return []
        try:
            use = int(self._load.read_text()) / 1000
        except (OSError, ValueError) as error:
            return self.report_missing(time_ns, "gpu", error)
        # The GPU shares the node's memory, and its power is part of a rail's.
        return [TelemetryPoint("gpu", time_ns, {"gpu": "jetson", "model": self._model}, {"use": use})]


def _is_jetson(root: Path) -> bool:
    compatible = _read_text(root / "proc/device-tree/compatible")
    return "nvidia,tegra" in compatible or (root / "etc/nv_tegra_release").exists()


def _find_rails(root: Path) -> list[_Rail]:
    channels: dict[tuple[str, int], tuple[str, Callable[[], float]]] = {}  # by I2C address and channel
    for address, channel, label, read_w in _channels(root):
        if label not in _NOT_CONNECTED:
            channels.setdefault((address, channel), (label, read_w))
    labels = [label for label, _ in channels.values()]
    module_input = next((name for name in _MODULE_INPUTS if name in labels), None)
    rails = []
    for (address, _), (label, read_w) in channels.items():
        if address.endswith(_CARRIER_ADDRESSES):
            name = f"carrier/{label}"
        elif module_input and label != module_input:
            name = f"{module_input}/{label}"
        else:
            name = label
        rails.append(_Rail(name, read_w))
    return rails


def _channels(root: Path) -> Iterator[tuple[str, int, str, Callable[[], float]]]:
    """I2C address, channel number, label and reader of each channel, with either driver."""
    for path in sorted(root.glob(_HWMON)):
        channel = int(path.name[2])
        yield path.parents[2].name, channel, _read_text(path), _hwmon_reader(path.parent, channel)
    for path in sorted(root.glob(_IIO)):
        channel = int(path.name.rpartition("_")[2])
        yield path.parents[1].name, channel + 1, _read_text(path), _iio_reader(path.parent, channel)


def _hwmon_reader(folder: Path, channel: int) -> Callable[[], float]:
    current, voltage = folder / f"curr{channel}_input", folder / f"in{channel}_input"  # mA, mV
    return lambda: int(current.read_text()) * int(voltage.read_text()) / 1e6


def _iio_reader(folder: Path, channel: int) -> Callable[[], float]:
    power = folder / f"in_power{channel}_input"  # mW
    return lambda: int(power.read_text()) / 1e3


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""
