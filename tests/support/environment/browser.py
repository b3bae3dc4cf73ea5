"""Render a page in headless Chromium and measure it: console messages, requests, page width, figure boxes."""

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
# Windows of Chromium are at least 500 pixels wide, so the page is shown in a frame.
_PROBE_PAGE = """<!DOCTYPE html><html lang="en"><head><title>probe</title></head><body>
<iframe srcdoc="{page}" style="border: 0; width: {width}px; height: 900px"></iframe>
<pre id="probe"></pre>
<script>
window.onload = () => {{
  const inside = document.querySelector("iframe").contentWindow, root = inside.document.documentElement;
  document.querySelector("#probe").textContent = JSON.stringify({{
    inner: inside.innerWidth,
    scroll: root.scrollWidth,
    figures: Array.from(root.querySelectorAll("figure"), (figure) => {{
      const box = figure.querySelector("svg").getBoundingClientRect();
      return [figure.id, box.width, box.height, box.right];
    }}),
    requests: inside.performance.getEntriesByType("resource").map((entry) => entry.name),
  }});
}};
</script></body></html>"""
# Console messages of the page, of any level, in the log of Chromium.
_CONSOLE_MESSAGE = re.compile(r":CONSOLE[:(]")


@dataclass(frozen=True)
class RenderedPage:
    """A page at one width; lengths are in CSS pixels."""

    viewport_width: int  # width of the frame
    scroll_width: int  # of the page
    figure_boxes: dict[str, tuple[float, float, float]]  # by id: width, height, right edge
    requests: list[str]
    console_messages: list[str]


def render_page(sandbox: ProcessSandbox, page: Path, width: int) -> RenderedPage:
    """Open the page in a frame of this width, with a script that measures it."""
    probe = sandbox.folder / f"probe-{width}.html"
    probe.write_text(_PROBE_PAGE.format(page=escape(page.read_text()), width=width))
    with short_temp_folder() as folder:  # Chromium creates sockets in it
        result = sandbox.start(
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}",
            "--hide-scrollbars", "--window-size=1400,1000", "--dump-dom", probe.as_uri(),
            environment={"TMPDIR": str(folder)},
        ).wait(timeout_s=PROCESS_TIMEOUT_S)  # fmt: skip
    assert result.returncode == 0, result.stderr
    match = re.search(r'<pre id="probe">(.+?)</pre>', result.stdout, re.DOTALL)
    assert match, result.stdout[-500:]
    measured: dict[str, Any] = json.loads(unescape(match[1]))
    figures = {name: (width, height, right) for name, width, height, right in measured["figures"]}
    messages = [line for line in result.stderr.splitlines() if _CONSOLE_MESSAGE.search(line)]
    return RenderedPage(measured["inner"], measured["scroll"], figures, measured["requests"], messages)
