"""Print the lock: one `name==version` line for each package of a pip installation report, without our own."""

import json
import re
import sys
from pathlib import Path


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    # Names as PyPA's specifications normalise them; a package's own spelling differs from release to release.
    pins = {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"]
        for item in report["install"]
    }
    pins.pop("sparse-mqtt")
    print("# Made by `make lock`. Constraints: versions of whatever is installed, not a list of what to install.")
    print("\n".join(f"{name}=={pins[name]}" for name in sorted(pins)))


if __name__ == "__main__":
    main()
