"""A contact sheet: the best pictures of a run on one page, each with what was found in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sources.gallery.annotate import DARK, LIGHT, label_colour, load_font

CELL_PX = 480
MAX_ASPECT_RATIO = 1.5  # height to width
GAP_PX = 16
TEXT_PX = 16
TITLE_PX = 26
MUTED = (150, 156, 168)
MAX_LEGEND_LABELS = 8


@dataclass(frozen=True, slots=True)
class SheetCell:
    """One picture of the sheet: at its left what it is called, at its right what is in it."""

    image: Image.Image
    title: str
    contents: str


def draw_contact_sheet(cells: Sequence[SheetCell], title: str, subtitle: str, kinds: Mapping[str, int]) -> Image.Image:
    """Return one page with the cells in three columns (four from thirteen on) below a legend of kinds and counts."""
    columns = min(len(cells), 4 if len(cells) > 12 else 3)
    rows = math.ceil(len(cells) / columns)
    first = cells[0].image
    picture_px = round(CELL_PX * min(MAX_ASPECT_RATIO, first.height / first.width))
    row_px = picture_px + round(TEXT_PX * 1.9) + GAP_PX
    head_px = TITLE_PX + TEXT_PX + 3 * GAP_PX if kinds else TITLE_PX + 2 * GAP_PX
    page = Image.new("RGB", (columns * (CELL_PX + GAP_PX) + GAP_PX, head_px + rows * row_px), DARK)
    draw = ImageDraw.Draw(page)
    _draw_head(draw, page.width, title, subtitle, kinds)
    for number, cell in enumerate(cells):
        left = GAP_PX + number % columns * (CELL_PX + GAP_PX)
        top = head_px + number // columns * row_px
        fitted = _fitted(cell.image, (CELL_PX, picture_px))
        page.paste(fitted, (left + (CELL_PX - fitted.width) // 2, top + (picture_px - fitted.height) // 2))
        middle = top + picture_px + TEXT_PX
        name = _cut(cell.title, CELL_PX / 2)
        draw.text((left, middle), name, LIGHT, load_font(TEXT_PX), anchor="lm")
        room_px = CELL_PX - load_font(TEXT_PX).getlength(name) - GAP_PX
        draw.text((left + CELL_PX, middle), _cut(cell.contents, room_px), MUTED, load_font(TEXT_PX), anchor="rm")
    return page


def format_counts(labels: Sequence[str]) -> str:
    """Return what a picture holds in words: `2 person, 1 car`."""
    return ", ".join(f"{count} {label}" for label, count in Counter(labels).most_common())


def _draw_head(draw: ImageDraw.ImageDraw, width: int, title: str, subtitle: str, kinds: Mapping[str, int]) -> None:
    middle = GAP_PX + TITLE_PX // 2
    draw.text((GAP_PX, middle), title, LIGHT, load_font(TITLE_PX), anchor="lm")
    after_title = GAP_PX + load_font(TITLE_PX).getlength(title) + GAP_PX
    draw.text((after_title, middle + 3), subtitle, MUTED, load_font(TEXT_PX), anchor="lm")
    left, middle = float(GAP_PX), middle + TITLE_PX // 2 + GAP_PX + TEXT_PX // 2
    radius = TEXT_PX // 3
    for label, count in Counter(kinds).most_common(MAX_LEGEND_LABELS):
        text = f"{label}  {count}"
        end = left + 3 * radius + load_font(TEXT_PX).getlength(text)
        if end > width - GAP_PX:
            return
        draw.ellipse((left, middle - radius, left + 2 * radius, middle + radius), fill=label_colour(label))
        draw.text((left + 3 * radius, middle), text, LIGHT, load_font(TEXT_PX), anchor="lm")
        left = end + 1.5 * GAP_PX


def _fitted(image: Image.Image, room: tuple[int, int]) -> Image.Image:
    scale = min(room[0] / image.width, room[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _cut(text: str, room_px: float) -> str:
    """The text, shortened with dots until it fits."""
    if load_font(TEXT_PX).getlength(text) <= room_px:
        return text
    while text and load_font(TEXT_PX).getlength(text + "...") > room_px:
        text = text[:-1]
    return text + "..."
