"""A page as a browser without a screen shows it: what it complains of, how wide it is, how large its pictures are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

from tests.support.monitor.unix_client import short_temp_folder
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, ProcessSandbox

CHROMIUM = "chromium"
# No window of Chromium's is narrower than 500 pixels, so the page is looked at in a frame.
_HOST = """<!DOCTYPE html><html lang="en"><head><title>probe</title></head><body>
<iframe srcdoc="{page}" style="border: 0; width: {width}px; height: 900px"></iframe>
<pre id="probe"></pre>
<script>
window.onload = () => {{
  const inside = document.querySelector("iframe").contentWindow, root = inside.document.documentElement;
  document.querySelector("#probe").textContent = JSON.stringify({{
    inner: inside.innerWidth,
    wide: root.scrollWidth,
    figures: Array.from(root.querySelectorAll("figure"), (figure) => {{
      const box = figure.querySelector("svg").getBoundingClientRect();
      return [figure.id, box.width, box.height, box.right];
    }}),
    requests: inside.performance.getEntriesByType("resource").map((entry) => entry.name),
  }});
}};
</script></body></html>"""
# Of what Chromium logs, what a page is to blame for.
_COMPLAINT = re.compile(r":(?:CONSOLE|ERROR:CONSOLE)[:(]")


@dataclass(frozen=True)
class RenderedPage:
    """What was seen of a page at one width. All in CSS pixels."""

    viewport_width: int  # width of the frame
    scroll_width: int  # of the page
    figure_boxes: dict[str, tuple[float, float, float]]  # by id: width, height, right edge
    requests: list[str]
    console_errors: list[str]


def render_page(sandbox: ProcessSandbox, page: Path, width: int) -> RenderedPage:
    """Open the page in a frame so wide, with a script that looks around in it."""
    probed = sandbox.folder / f"probed-{width}.html"
    probed.write_text(_HOST.format(page=escape(page.read_text()), width=width))
    with short_temp_folder() as folder:  # it has sockets among its temporary files
        said = sandbox.start(
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}",
            "--hide-scrollbars", "--window-size=1400,1000", "--dump-dom", probed.as_uri(),
            environment={"TMPDIR": str(folder)},
        ).wait(timeout_s=PROCESS_TIMEOUT_S)  # fmt: skip
    assert said.returncode == 0, said.stderr
    told = re.search(r'<pre id="probe">(.+?)</pre>', said.stdout, re.DOTALL)
    assert told, said.stdout[-500:]
    found: dict[str, Any] = json.loads(unescape(told[1]))
    figures = {name: (wide, high, right) for name, wide, high, right in found["figures"]}
    complaints = [line for line in said.stderr.splitlines() if _COMPLAINT.search(line)]
    return RenderedPage(found["inner"], found["wide"], figures, found["requests"], complaints)
