"""NVIDIA Jetson: power rails from the INA3221 monitors, and the GPU load, which NVML lacks on most Jetsons."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from monitor.sensors.base import Reading, Sensor, read_text
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
    """A rail whose power is the product of the numbers in `files`, in units of 1 W / `per_watt`."""

    address: str  # of its monitor on the I2C bus
    name: str
    files: tuple[Path, ...]
    per_watt: float
    integrator: EnergyIntegrator = field(default_factory=EnergyIntegrator)

    def read_w(self) -> float:
        return math.prod(int(file.read_text()) for file in self.files) / self.per_watt


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

    def measure(self, now_s: float) -> Iterator[Reading]:
        """The readings, and reports of values that cannot be read."""
        if self._rails is None:
            self._rails = []
            compatible = read_text(self._root / "proc/device-tree/compatible")
            if "nvidia,tegra" in compatible or (self._root / "etc/nv_tegra_release").exists():
                yield from self._find()
        for rail in self._rails:
            power_w: float | None = None
            try:
                power_w = rail.read_w()
            except (OSError, ValueError) as error:
                yield from self.report_missing(rail.name, error)
            energy_j = rail.integrator.increase_j(power_w, now_s)
            if power_w is not None:
                yield "power", {"rail": rail.name}, {"power_w": power_w, "energy_j": energy_j}
        if self._load is not None:
            try:
                # The GPU shares the node's memory, and its power is part of a rail's.
                use = int(self._load.read_text()) / 1000
                yield "gpu", {"gpu": "jetson", "model": self._model}, {"use": use}
            except (OSError, ValueError) as error:
                yield from self.report_missing("gpu", error)

    def _find(self) -> Iterator[Reading]:
        self._rails = _find_rails(self._root)
        self._load = next((path for pattern in _LOADS for path in sorted(self._root.glob(pattern))), None)
        self._model = read_text(self._root / "proc/device-tree/model")
        if not self._rails:
            yield from self.report_missing("", "there is no INA3221 in /sys/bus/i2c/drivers")
        if self._load is None:
            reason = f"there is neither /{_LOADS[0]} nor a file for the load of another release"
            yield from self.report_missing("gpu", reason)


def _find_rails(root: Path) -> list[_Rail]:
    channels: dict[tuple[str, int], _Rail] = {}  # by I2C address and channel: a monitor may be found by two paths
    files: tuple[Path, ...]
    for path in sorted(root.glob(_HWMON)):
        channel = int(path.name[2])
        files = (path.with_name(f"curr{channel}_input"), path.with_name(f"in{channel}_input"))  # mA, mV
        address = path.parents[2].name
        channels.setdefault((address, channel), _Rail(address, read_text(path), files, 1e6))
    for path in sorted(root.glob(_IIO)):
        channel = int(path.name[-1])
        address = path.parents[1].name
        files = (path.with_name(f"in_power{channel}_input"),)  # mW
        channels.setdefault((address, channel + 1), _Rail(address, read_text(path), files, 1e3))
    rails = [rail for rail in channels.values() if rail.name not in _NOT_CONNECTED]
    labels = {rail.name for rail in rails}
    module_input = next((name for name in _MODULE_INPUTS if name in labels), None)
    for rail in rails:
        if rail.address.endswith(_CARRIER_ADDRESSES):
            rail.name = f"carrier/{rail.name}"
        elif module_input and rail.name != module_input:
            rail.name = f"{module_input}/{rail.name}"
    return rails
