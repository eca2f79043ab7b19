"""Chat messages with pictures."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image


def png_bytes(image: Image) -> bytes:
    """The image as a PNG file; the same bytes are stored and sent."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def encodable(text: str) -> str:
    """The text without lone surrogates: JSON may hold them, but no file and no request takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def words(text: str) -> dict[str, Any]:
    """A text as a part of a message."""
    return {"type": "text", "text": encodable(text)}


def picture(image: Image) -> dict[str, Any]:
    """An image as a part of a message."""
    url = "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def look_and_say(
    system: str, text: str, image: Image, earlier: Sequence[tuple[str, Image]] = ()
) -> list[dict[str, Any]]:
    """Chat messages: instructions, then earlier texts with their images, then a text with an image."""
    parts = [part for said, shown in (*earlier, (text, image)) for part in (words(said), picture(shown))]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]
