"""Images inside a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from jaxtyping import UInt8


def data_url(image: UInt8[np.ndarray, "height width 3"], side: int = 256) -> str:
    """A JPEG of an image, of at most `side` pixels a side, as the value of an attribute `src`."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
