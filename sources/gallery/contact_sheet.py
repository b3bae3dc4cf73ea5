"""Draws a contact sheet: the best pictures of a run on one page, each with a list of its objects."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sources.gallery.annotate import DARK, LIGHT, fit_image, label_colour, load_font

CELL_PX = 480
MAX_ASPECT_RATIO = 1.5  # height to width
GAP_PX = 16
TEXT_PX = 16
TITLE_PX = 26
MUTED = (150, 156, 168)
MAX_LEGEND_LABELS = 8


@dataclass(frozen=True, slots=True)
class SheetCell:
    """One picture of the sheet, with its title below on the left and its contents on the right."""

    image: Image.Image
    title: str
    contents: str


def draw_contact_sheet(cells: Sequence[SheetCell], title: str, subtitle: str, counts: Mapping[str, int]) -> Image.Image:
    """Return a page of cells in three columns, four for more than twelve cells, below a legend of labels and counts."""
    columns = min(len(cells), 4 if len(cells) > 12 else 3)
    rows = math.ceil(len(cells) / columns)
    first = cells[0].image
    picture_px = round(CELL_PX * min(MAX_ASPECT_RATIO, first.height / first.width))
    row_px = picture_px + round(TEXT_PX * 1.9) + GAP_PX
    head_px = TITLE_PX + TEXT_PX + 3 * GAP_PX if counts else TITLE_PX + 2 * GAP_PX
    page = Image.new("RGB", (columns * (CELL_PX + GAP_PX) + GAP_PX, head_px + rows * row_px), DARK)
    draw = ImageDraw.Draw(page)
    font = load_font(TEXT_PX)
    _draw_head(draw, page.width, title, subtitle, counts)
    for number, cell in enumerate(cells):
        left = GAP_PX + number % columns * (CELL_PX + GAP_PX)
        top = head_px + number // columns * row_px
        page.paste(fit_image(cell.image, (CELL_PX, picture_px), DARK), (left, top))
        middle = top + picture_px + TEXT_PX
        name = _shorten(cell.title, CELL_PX / 2)
        draw.text((left, middle), name, LIGHT, font, anchor="lm")
        contents = _shorten(cell.contents, CELL_PX - font.getlength(name) - GAP_PX)
        draw.text((left + CELL_PX, middle), contents, MUTED, font, anchor="rm")
    return page


def format_counts(labels: Sequence[str]) -> str:
    """The labels of a picture as text: `2 person, 1 car`."""
    return ", ".join(f"{count} {label}" for label, count in Counter(labels).most_common())


def _draw_head(draw: ImageDraw.ImageDraw, width: int, title: str, subtitle: str, counts: Mapping[str, int]) -> None:
    middle = GAP_PX + TITLE_PX // 2
    font = load_font(TEXT_PX)
    draw.text((GAP_PX, middle), title, LIGHT, load_font(TITLE_PX), anchor="lm")
    after_title = GAP_PX + load_font(TITLE_PX).getlength(title) + GAP_PX
    draw.text((after_title, middle + 3), subtitle, MUTED, font, anchor="lm")
    left, middle = float(GAP_PX), middle + TITLE_PX // 2 + GAP_PX + TEXT_PX // 2
    radius = TEXT_PX // 3
    for label, count in Counter(counts).most_common(MAX_LEGEND_LABELS):
        text = f"{label}  {count}"
        end = left + 3 * radius + font.getlength(text)
        if end > width - GAP_PX:
            return
        draw.ellipse((left, middle - radius, left + 2 * radius, middle + radius), fill=label_colour(label))
        draw.text((left + 3 * radius, middle), text, LIGHT, font, anchor="lm")
        left = end + 1.5 * GAP_PX


def _shorten(text: str, width_px: float) -> str:
    """`text`, cut and with dots appended if it is wider than `width_px`."""
    font = load_font(TEXT_PX)
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "...") > width_px:
        text = text[:-1]
    return text + "..."
