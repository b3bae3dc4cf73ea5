"""A contact sheet: the best pictures of a run on one page, each with what was found in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sources.gallery.annotate import INK, PAPER, colour_of, font_of

CELL_PX = 480
TALLEST = 1.5  # height to width
GAP_PX = 16
TEXT_PX = 16
TITLE_PX = 26
MUTED = (150, 156, 168)
KINDS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of the sheet: at its left what it is called, at its right what is in it."""

    image: Image.Image
    name: str
    found: str


def contact_sheet(cells: Sequence[Cell], title: str, subtitle: str, kinds: Mapping[str, int]) -> Image.Image:
    """Return one page with the cells in three columns (four from thirteen on) below a legend of kinds and counts."""
    columns = min(len(cells), 4 if len(cells) > 12 else 3)
    rows = math.ceil(len(cells) / columns)
    first = cells[0].image
    picture_px = round(CELL_PX * min(TALLEST, first.height / first.width))
    row_px = picture_px + round(TEXT_PX * 1.9) + GAP_PX
    head_px = TITLE_PX + TEXT_PX + 3 * GAP_PX if kinds else TITLE_PX + 2 * GAP_PX
    page = Image.new("RGB", (columns * (CELL_PX + GAP_PX) + GAP_PX, head_px + rows * row_px), INK)
    draw = ImageDraw.Draw(page)
    _draw_head(draw, page.width, title, subtitle, kinds)
    for number, cell in enumerate(cells):
        left = GAP_PX + number % columns * (CELL_PX + GAP_PX)
        top = head_px + number // columns * row_px
        fitted = _fitted(cell.image, (CELL_PX, picture_px))
        page.paste(fitted, (left + (CELL_PX - fitted.width) // 2, top + (picture_px - fitted.height) // 2))
        middle = top + picture_px + TEXT_PX
        name = _cut(cell.name, CELL_PX / 2)
        draw.text((left, middle), name, PAPER, font_of(TEXT_PX), anchor="lm")
        room_px = CELL_PX - font_of(TEXT_PX).getlength(name) - GAP_PX
        draw.text((left + CELL_PX, middle), _cut(cell.found, room_px), MUTED, font_of(TEXT_PX), anchor="rm")
    return page


def counted(labels: Sequence[str]) -> str:
    """Return what a picture holds in words: `2 person, 1 car`."""
    return ", ".join(f"{count} {label}" for label, count in Counter(labels).most_common())


def _draw_head(draw: ImageDraw.ImageDraw, width: int, title: str, subtitle: str, kinds: Mapping[str, int]) -> None:
    middle = GAP_PX + TITLE_PX // 2
    draw.text((GAP_PX, middle), title, PAPER, font_of(TITLE_PX), anchor="lm")
    after_title = GAP_PX + font_of(TITLE_PX).getlength(title) + GAP_PX
    draw.text((after_title, middle + 3), subtitle, MUTED, font_of(TEXT_PX), anchor="lm")
    left, middle = float(GAP_PX), middle + TITLE_PX // 2 + GAP_PX + TEXT_PX // 2
    radius = TEXT_PX // 3
    for label, count in Counter(kinds).most_common(KINDS_SHOWN):
        text = f"{label}  {count}"
        end = left + 3 * radius + font_of(TEXT_PX).getlength(text)
        if end > width - GAP_PX:
            return
        draw.ellipse((left, middle - radius, left + 2 * radius, middle + radius), fill=colour_of(label))
        draw.text((left + 3 * radius, middle), text, PAPER, font_of(TEXT_PX), anchor="lm")
        left = end + 1.5 * GAP_PX


def _fitted(image: Image.Image, room: tuple[int, int]) -> Image.Image:
    scale = min(room[0] / image.width, room[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _cut(text: str, room_px: float) -> str:
    """The text, shortened with dots until it fits."""
    if font_of(TEXT_PX).getlength(text) <= room_px:
        return text
    while text and font_of(TEXT_PX).getlength(text + "...") > room_px:
        text = text[:-1]
    return text + "..."
