"""How figures look: colours for the colour-blind too; dashes, markers and hatches for print in grey. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# A column of a paper at three quarters of its size, and so is a phone; half of a desktop page.
FIGURE_WIDTH_IN, PNG_DPI = 4.7, 200
# Not quite black, white and grey: the page finds these in the SVG and gives each its counterpart for dark screens.
FOREGROUND, MUTED, GRIDLINE, BACKGROUND = "#1f2328", "#57606b", "#e3e6ea", "#fffffe"
IDLE_FILL = "#d0d5db"  # of a bar: where nothing was done

_LABEL_CHARACTERS = 34


class LineStyle(NamedTuple):
    """Of one run, in every figure."""

    colour: str
    linestyle: Any
    marker: str


class PartStyle(NamedTuple):
    """Of one part of a stacked bar."""

    colour: str
    hatch: str


# Okabe and Ito's palette: https://jfly.uni-koeln.de/color/. Yellow is too faint for a line.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, GREY, YELLOW = "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442"

LINE_STYLES = (
    LineStyle(BLUE, "-", "o"),
    LineStyle(VERMILION, (0, (5, 1.6)), "s"),
    LineStyle(GREEN, (0, (1.4, 1.2)), "^"),
    LineStyle(PURPLE, (0, (6, 1.5, 1.2, 1.5)), "D"),
    LineStyle(ORANGE, (0, (3, 1, 1, 1, 1, 1)), "v"),
    LineStyle(SKY, (0, (8, 2)), "P"),
    LineStyle(GREY, (0, (2, 1)), "X"),
)

_KNOWN_PARTS = {
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
_FURTHER_PARTS = (
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
    "axes.labelcolor": FOREGROUND,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "hatch.color": BACKGROUND,
    "hatch.linewidth": 0.8,
    "legend.labelcolor": FOREGROUND,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # TrueType: publishers turn matplotlib's usual Type 3 away
    "svg.fonttype": "path",  # looks the same everywhere, also where a paper is made without our font
    "svg.hashsalt": "sparse",  # the same figure, the same file
    "text.color": FOREGROUND,
    "text.parse_math": False,  # a name may have dollar signs
    "xtick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelsize": 9,
}


def part_styles(names: Sequence[str]) -> dict[str, PartStyle]:
    """A look for each part."""
    further = iter(range(len(names)))
    return {name: _KNOWN_PARTS.get(name) or _FURTHER_PARTS[next(further) % len(_FURTHER_PARTS)] for name in names}


def display_label(name: str, characters: int = _LABEL_CHARACTERS) -> str:
    """A name as it stands in a figure: on one line, cut where it is long."""
    text = " ".join("".join(letter if letter.isprintable() else "?" for letter in name).split()) or "(no name)"
    text = text if len(text) <= characters else f"{text[: characters - 1]}…"
    # matplotlib leaves out of a legend what begins with an underscore.
    return f" {text}" if text.startswith("_") else text
