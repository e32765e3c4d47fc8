"""Pictures as text for the browser, and durations as words."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_url(picture: Image.Image, lossless: bool = True) -> str:
    """Return a picture as a data: URL, a PNG or a small JPEG."""
    target = io.BytesIO()
    if lossless:
        picture.save(target, "PNG", compress_level=1)
    else:
        picture.convert("RGB").save(target, "JPEG", quality=85)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}"


def duration(seconds: float) -> str:
    """Return a duration in words."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
