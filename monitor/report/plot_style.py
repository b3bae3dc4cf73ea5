"""The style of plots: colours that colour-blind readers can tell apart; dashes, markers and hatches for grey prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# The width of a phone, or of half a desktop page; scaled to three quarters, that of a column of a paper.
FIGURE_WIDTH_IN, PNG_DPI = 4.7, 200
# Not quite black, white and grey: the page replaces these in the SVG by its own colours, which a dark screen inverts.
FOREGROUND, MUTED, GRIDLINE, BACKGROUND = "#1f2328", "#57606b", "#e3e6ea", "#fffffe"
IDLE_FILL = "#d0d5db"
_LABEL_CHARACTERS = 34


class LineStyle(NamedTuple):
    """The style of one run in all figures."""

    colour: str
    linestyle: Any
    marker: str


class PartStyle(NamedTuple):
    """The style of one part of a stacked bar."""

    colour: str
    hatch: str


# The palette of Okabe and Ito, https://jfly.uni-koeln.de/color/, without its yellow, which is too faint for a line.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, GREY = "#e69f00", "#56b4e9", "#7f7f7f"

LINE_STYLES = (
    LineStyle(BLUE, "-", "o"),
    LineStyle(VERMILION, (0, (5, 1.6)), "s"),
    LineStyle(GREEN, (0, (1.4, 1.2)), "^"),
    LineStyle(PURPLE, (0, (6, 1.5, 1.2, 1.5)), "D"),
    LineStyle(ORANGE, (0, (3, 1, 1, 1, 1, 1)), "v"),
    LineStyle(SKY, (0, (8, 2)), "P"),
    LineStyle(GREY, (0, (2, 1)), "X"),
)
_PART_STYLES = {
    "queue": PartStyle(SKY, ""),
    "decode": PartStyle(ORANGE, "//"),
    "compute": PartStyle(BLUE, ""),
    "encode": PartStyle(PURPLE, "\\\\"),
    "network": PartStyle(VERMILION, "...."),
    "forward": PartStyle(BLUE, ""),
    "backward": PartStyle(SKY, "//"),
    "update": PartStyle(GREEN, "...."),
    "idle": PartStyle(IDLE_FILL, ""),
}
_OTHER_PART_STYLES = (
    PartStyle(BLUE, ""),
    PartStyle(ORANGE, "//"),
    PartStyle(GREEN, "\\\\"),
    PartStyle(VERMILION, "...."),
    PartStyle(SKY, ""),
    PartStyle(PURPLE, "xx"),
    PartStyle(GREY, "--"),
)

RC_PARAMS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": FOREGROUND,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": BACKGROUND,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "hatch.color": BACKGROUND,
    "hatch.linewidth": 0.8,
    "legend.labelcolor": FOREGROUND,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # TrueType: publishers reject matplotlib's default, Type 3
    "svg.fonttype": "path",  # independent of the fonts of the reader
    "svg.hashsalt": "sparse",  # the same figure gives the same file
    "text.color": FOREGROUND,
    "text.parse_math": False,  # the name of a run may contain dollar signs
    "xtick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelsize": 9,
}


def part_styles(names: Sequence[str]) -> dict[str, PartStyle]:
    """A style per part of a bar."""
    unused = iter(range(len(names)))
    return {
        name: _PART_STYLES.get(name) or _OTHER_PART_STYLES[next(unused) % len(_OTHER_PART_STYLES)] for name in names
    }


def display_label(name: str, characters: int = _LABEL_CHARACTERS) -> str:
    """A name as printable text on one line of at most `characters`."""
    text = " ".join("".join(letter if letter.isprintable() else "?" for letter in name).split()) or "(no name)"
    text = text if len(text) <= characters else f"{text[: characters - 1]}…"
    # matplotlib omits labels with a leading underscore from a legend.
    return f" {text}" if text.startswith("_") else text
