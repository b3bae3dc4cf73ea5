"""Draws results into their pictures (boxes with labels, bars for classes), and pictures on a contact sheet."""

import functools
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from brokers.process.image_decode import RgbImage

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[float, float, float, float]  # left, top, right, bottom
Colour = tuple[int, int, int]

DARK: Colour = (16, 18, 22)
LIGHT: Colour = (240, 242, 246)
TEXT_BACKDROP = (*DARK, 190)
# Bright and distinct: dark text is readable on each, and each stands out against a street, a lawn and a night sky.
PALETTE: tuple[Colour, ...] = (
    (255, 176, 0),
    (0, 200, 255),
    (255, 100, 150),
    (110, 225, 130),
    (182, 146, 255),
    (255, 128, 66),
    (46, 230, 200),
    (242, 233, 78),
    (120, 165, 255),
    (238, 120, 240),
    (165, 226, 45),
    (255, 92, 92),
)
MAX_CLASSES = 3
MIN_TEXT_PX = 13
_SEED = 46678  # chosen so that the frequent labels of a street (person, bicycle, car, bus, ...) differ in colour
CELL_PX = 480
MAX_ASPECT_RATIO = 1.5  # height to width
GAP_PX = 16
TEXT_PX = 16
TITLE_PX = 26
MUTED = (150, 156, 168)
MAX_LEGEND_LABELS = 8


def label_colour(label: str) -> Colour:
    """The colour of a label, the same in every picture, process and run."""
    return PALETTE[zlib.crc32(label.encode(), _SEED) % len(PALETTE)]


@functools.lru_cache(maxsize=32)
def load_font(size: int) -> Font:
    """Pillow's built-in scalable font: no font needs to be installed."""
    return ImageFont.load_default(size)


def fit_image(image: Image.Image, size: tuple[int, int], background: Colour) -> Image.Image:
    """Scale an image to fit into `size`, centred between bars of the background colour."""
    # Not ImageOps.pad, which fails where a side of an extremely long image is rounded to 0 pixels.
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    page = Image.new("RGB", size, background)
    page.paste(image.resize(inner, Image.Resampling.LANCZOS), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return page


def annotate(picture: RgbImage, result: Mapping[str, Any], width: int, *, caption: bool = True) -> Image.Image:
    """Return `picture`, (H, W, 3), scaled to `width` with its result drawn in; boxes are in pixels of `picture`.

    `caption` adds the picture's index, its number of objects and its age, where no classes are drawn.
    """
    scale = width / picture.shape[1]
    image = Image.fromarray(picture)
    if scale != 1:
        size = (width, max(1, round(picture.shape[0] * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.BOX)
    draw = ImageDraw.Draw(image, "RGBA")
    objects = result.get("objects") or []
    text_px = max(MIN_TEXT_PX, round(min(image.width / 60, image.height / 22)))
    _draw_objects(draw, image.size, objects, scale, text_px)
    if result.get("classes"):
        _draw_classes(draw, image.size, result["classes"], text_px)
    elif caption:
        _draw_caption(draw, image.size, _caption(result, len(objects)), text_px)
    return image


def _draw_objects(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], objects: Sequence[Mapping[str, Any]], scale: float, text_px: int
) -> None:
    ranked = sorted(objects, key=lambda item: float(item["score"]), reverse=True)
    boxes = [_scaled_box(item["box"], scale, size) for item in ranked]
    line_px = max(2, round(text_px / 7))
    for item, box in zip(reversed(ranked), reversed(boxes), strict=True):  # the highest score on top
        outline = (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1)
        draw.rounded_rectangle(outline, radius=line_px * 2 + 1, outline=(*DARK, 150), width=line_px + 2)
        draw.rounded_rectangle(box, radius=line_px * 2, outline=label_colour(item["label"]), width=line_px)
    occupied: list[Box] = []
    for item, box in zip(ranked, boxes, strict=True):  # the highest score chooses the place of its label first
        text = f"{item['label']} {float(item['score']):.0%}"
        place = _label_place(_label_size(text, text_px), box, size, occupied)
        occupied.append(place)
        draw.rounded_rectangle(place, radius=text_px // 4, fill=label_colour(item["label"]))
        draw.text((place[0] + text_px * 0.4, (place[1] + place[3]) / 2), text, DARK, load_font(text_px), anchor="lm")


def _scaled_box(box: Sequence[float], scale: float, size: tuple[int, int]) -> Box:
    """The corners, within the drawn picture, of a box [left, top, width, height]."""
    left, top, width, height = (float(value) * scale for value in box)
    right, bottom = min(size[0] - 1.0, left + width), min(size[1] - 1.0, top + height)
    left, top = max(0.0, left), max(0.0, top)
    return left, top, max(left, right), max(top, bottom)


def _label_size(text: str, text_px: int) -> tuple[float, float]:
    return load_font(text_px).getlength(text) + text_px * 0.8, text_px * 1.45


def _label_place(label: tuple[float, float], box: Box, size: tuple[int, int], occupied: Sequence[Box]) -> Box:
    """The first free place within the picture: above the box, inside its top, below it, inside its bottom."""
    width, height = label
    left = max(0.0, min(box[0], size[0] - width))
    tops = (box[1] - height - 1, box[1] + 2, box[3] + 1, box[3] - height - 2)
    within = [top for top in tops if 0 <= top <= size[1] - height]
    places = [(left, top, left + width, top + height) for top in within or [0.0]]
    return next((place for place in places if not any(_overlap(place, other) for other in occupied)), places[0])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _caption(result: Mapping[str, Any], objects: int) -> str:
    parts = [f"#{result['index']}"] if "index" in result else []
    parts.append(f"{objects} object{'' if objects == 1 else 's'}" if objects else "nothing found")
    if result.get("age_ms") is not None:
        parts.append(f"{float(result['age_ms']):.0f} ms")
    return "   ".join(parts)


def _draw_caption(draw: ImageDraw.ImageDraw, size: tuple[int, int], text: str, text_px: int) -> None:
    width, height = _label_size(text, text_px)
    left, top = text_px * 0.5, size[1] - height - text_px * 0.5
    draw.rounded_rectangle((left, top, left + width, top + height), radius=text_px // 3, fill=TEXT_BACKDROP)
    draw.text((left + text_px * 0.4, top + height / 2), text, LIGHT, load_font(text_px), anchor="lm")


def _draw_classes(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], classes: Sequence[Mapping[str, Any]], text_px: int
) -> None:
    shown = classes[:MAX_CLASSES]
    font = load_font(text_px)
    label_px = min(size[0] * 0.5, max(font.getlength(str(item["label"])) for item in shown))
    bar_px, gap = size[0] * 0.16, text_px * 0.6
    width = label_px + bar_px + font.getlength("100%") + 4 * gap
    row_px = text_px * 1.5
    left, top = gap, size[1] - row_px * len(shown) - 2 * gap
    draw.rounded_rectangle((left, top, left + width, size[1] - gap), radius=text_px // 3, fill=TEXT_BACKDROP)
    for row, item in enumerate(shown):
        score = min(1.0, max(0.0, float(item["score"])))
        middle = top + gap / 2 + row_px * (row + 0.5)
        begin = left + label_px + 2 * gap
        draw.text((left + gap, middle), str(item["label"]), LIGHT, font, anchor="lm")
        for length, colour in ((bar_px, (255, 255, 255, 40)), (bar_px * score, label_colour(str(item["label"])))):
            draw.rectangle((begin, middle - text_px / 3, begin + length, middle + text_px / 3), fill=colour)
        draw.text((begin + bar_px + gap, middle), f"{score:.0%}", LIGHT, font, anchor="lm")


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
