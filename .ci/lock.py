"""Print requirements.lock from a pip installation report: one `name==version` line for each package but our own."""

import json
import re
import sys
from pathlib import Path


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    # Names are normalized as PyPA specifies: the spelling in the metadata differs between releases of a package.
    pins = {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"]
        for item in report["install"]
    }
    pins.pop("sparse-mqtt")
    print("# Made by `make lock`. Constraints: the versions of packages if they are installed, not a list to install.")
    print("\n".join(f"{name}=={pins[name]}" for name in sorted(pins)))


if __name__ == "__main__":
    main()
