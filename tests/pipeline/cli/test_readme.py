"""The Python example of README.md runs as shown."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.environment.checkout import ROOT
from tests.support.pipelines.ingress_pipeline import IngressPipeline
from tests.support.pipelines.processes import ProcessSandbox

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
FILES = {text.split()[1]: text for kind, text in BLOCKS if kind in ("python", "toml")}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def test_python_example_of_readme_runs(sandbox: ProcessSandbox) -> None:
    assert COMMANDS == ["sparse run smooth.toml", "python smooth.py"]
    for name, text in FILES.items():
        (sandbox.folder / name).write_text(text)
    pipeline = IngressPipeline(sandbox, sandbox.folder / "smooth.toml")
    client = sandbox.folder / "smooth.py"
    assert "mqtt://127.0.0.1:1883" in FILES["smooth.py"]
    client.write_text(FILES["smooth.py"].replace("mqtt://127.0.0.1:1883", pipeline.address))
    result = subprocess.run(
        [sys.executable, client.name], cwd=sandbox.folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    deviations = [float(line) for line in result.stdout.splitlines()]
    assert len(deviations) == 20
    assert all(0.1 < deviation < 0.2 for deviation in deviations)  # of 5 averaged uniform numbers: 0.29 / sqrt(5)
    pipeline.interrupt()
