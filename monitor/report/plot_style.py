"""The style of plots: colours that colour-blind readers can tell apart; dashes, markers and hatches for grey prints."""

from collections.abc import Sequence
from pathlib import Path
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

# matplotlib's settings: those that do not depend on the colours above are in the style sheet.
STYLE_SHEET = Path(__file__).with_name("plots.mplstyle")
COLOUR_SETTINGS: Any = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FOREGROUND,
    "figure.facecolor": BACKGROUND,
    "hatch.color": BACKGROUND,
    "legend.labelcolor": FOREGROUND,
    "text.color": FOREGROUND,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
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
