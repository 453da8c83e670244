"""The parts that all pages share: pictures inside them, and the templates that they are made from."""

import base64
import io
import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from pixrl.untrusted import encodable

SMALL = 128
"""Pictures up to this side are embedded as they are; a browser enlarges them smoothly where it is by little."""
THUMBNAIL, FULL = 256, 768
"""Longest side in pixels of a picture among others, and of one that stands alone."""
TEMPLATES = Environment(
    loader=PackageLoader("pixrl.report"),
    autoescape=select_autoescape(["html", "j2"], default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["three"] = lambda value: "–" if value is None or math.isnan(value) else f"{value:.3f}"


class Embedded(str):
    """A picture as a data URI."""

    file: str | None = None
    """The picture in full beside the page, where the embedded one is scaled down."""


def inline(path: Path, side: int, page: Path | None = None) -> Embedded:
    """Return a picture as a data URI: large ones scaled down to `side` pixels, small ones as they are.

    A small one that stands alone (a side of FULL) is enlarged by Lanczos, for browsers draw such a step in blocks.

    Args:
        path: the picture's file.
        side: longest side in pixels.
        page: the folder of the page, from which it can show a large picture in full.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        longest = max(picture.size)
        if longest <= SMALL and side < FULL:
            return Embedded(f"data:image/png;base64,{base64.b64encode(content).decode()}")
        shown = picture.convert("RGB")
        factor = side / longest if longest > SMALL else side // longest
        if longest <= SMALL or longest > side:
            size = (max(1, round(shown.width * factor)), max(1, round(shown.height * factor)))
            shown = shown.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        shown.save(buffer, format="WEBP", quality=86)
    found = Embedded(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    if page is not None and longest > side:
        found.file = quote(Path(os.path.relpath(path, page)).as_posix())
    return found


def render(template: str, view: dict[str, Any], refresh: float | None = None) -> str:
    """Fill in a template; what UTF-8 cannot write, such as a folder's name in another encoding, is spelled out.

    `refresh`: seconds after which a page loads itself again.
    """
    page = TEMPLATES.get_template(template)
    return encodable(page.render(version=installed_version(), refresh=refresh, **view))


def installed_version() -> str:
    """Return the version of the installed pixrl; "(not installed)" where it runs from a folder."""
    try:
        return version("pixrl")
    except PackageNotFoundError:
        return "(not installed)"
