"""Real photographs as network input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..options import OptionError

# The statistics that torchvision's networks were trained with.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def load(path: Path | None) -> list[np.ndarray]:
    """RGB pictures as (height, width, 3) uint8: the one at `path`, or the two that scikit-learn ships.

    Raises `OptionError` where `path` is no readable picture.
    """
    if path is None:
        from sklearn.datasets import load_sample_images

        return list(load_sample_images().images)
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return [np.asarray(picture.convert("RGB"))]
    except FileNotFoundError:
        raise OptionError("--image", path, "an existing picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OptionError("--image", path, f"a picture that Pillow can read ({error})") from None


def batch_of(photos: list[np.ndarray], batch: int, size: int = 224) -> torch.Tensor:
    """(batch, 3, size, size) float32, normalised: centre crops of the photographs in turn, zoomed in further with every
    repetition so that no two are alike."""
    return torch.stack([_crop(photos[i % len(photos)], 0.92 ** (i // len(photos)), size) for i in range(batch)])


def _crop(photo: np.ndarray, share: float, size: int) -> torch.Tensor:
    height, width = photo.shape[:2]
    side = max(1, round(min(height, width) * share))
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(photo[top : top + side, left : left + side].copy()).permute(2, 0, 1).float() / 255
    resized = F.interpolate(square[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return (resized - MEAN) / STD
