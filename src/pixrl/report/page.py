"""The parts that all pages share: pictures inside them, and the templates that they are made from."""

import base64
import io
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from pixrl.untrusted import encodable

SMALL = 128
"""Pictures up to this side are embedded as they are; the browser enlarges them smoothly."""
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


def inline(path: Path, side: int) -> str:
    """Return a picture as a data URI: small ones as they are, large ones scaled down to `side` pixels."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        if max(picture.size) <= SMALL:
            return f"data:image/png;base64,{base64.b64encode(content).decode()}"
        smaller = picture.convert("RGB")
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        smaller.save(buffer, format="WEBP", quality=86)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(template: str, view: dict[str, Any]) -> str:
    """Fill in a template; what UTF-8 cannot write, such as a folder's name in another encoding, is spelled out."""
    return encodable(TEMPLATES.get_template(template).render(version=installed_version(), **view))


def installed_version() -> str:
    """Return the version of the installed pixrl; "(not installed)" where it runs from a folder."""
    try:
        return version("pixrl")
    except PackageNotFoundError:
        return "(not installed)"
