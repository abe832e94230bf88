"""Random deformation and grey-value changes of batches, on their device.

One field of source coordinates serves an image and its labels, so they stay aligned: images are
interpolated, labels take the nearest pixel. Draws are made on the CPU from a given generator, so a
seed means the same on every device.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Rotation = Literal["none", "quarter", "free"]


@dataclass(frozen=True)
class Augmentation:
    """What ``augment`` draws, a sample at a time.

    Args:
        elastic_px: standard deviation of the displacements on the coarse grid, in pixels; 0 for no
            elastic deformation.
        elastic_grid: displacements along each axis of that grid, at least 2.
        rotation: "none", "quarter" (multiples of 90 degrees) or "free" (any angle).
        flip: mirror left to right in half of the samples.
        contrast: standard deviation of the factor on grey values, around 1.
        brightness: standard deviation of the offset of grey values, in units of their own.
    Raises: ValueError for values out of range.
    Source: Ronneberger et al. 2015, section 3.1 (10 px on a 3x3 grid, bicubic).
    """

    elastic_px: float = 10.0
    elastic_grid: int = 3
    rotation: Rotation = "quarter"
    flip: bool = True
    contrast: float = 0.1
    brightness: float = 0.1

    def __post_init__(self) -> None:
        for name in ("elastic_px", "contrast", "brightness"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"augment: {name} must be >= 0, got {getattr(self, name)}")
        if self.elastic_grid < 2:
            raise ValueError(f"augment: elastic_grid must be >= 2, got {self.elastic_grid}")
        if self.rotation not in ("none", "quarter", "free"):
            raise ValueError(
                f"augment: rotation must be none, quarter or free, got {self.rotation!r}"
            )


def augment(
    images: Tensor,
    labels: Tensor,
    settings: Augmentation,
    generator: torch.Generator,
    *,
    batch: int | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Deform a batch and change its grey values.

    Args:
        images: [B, C, H, W] floating point.
        labels: [B, L, H, W] integers: L aligned label images, such as classes and cells.
        settings: what to draw.
        generator: a CPU generator.
        batch: samples to draw for; None for as many as there are.
        part: which samples of that batch these are.
    Returns: images and labels of the same shapes, dtypes and device; what comes from outside the
        image is its mirror image.
    Raises: ValueError if the two do not share batch, height, width and device.
    Source: Ronneberger et al. 2015, section 3.1.
    """
    if images.ndim != 4 or labels.ndim != 4 or images.shape[2:] != labels.shape[2:]:
        raise ValueError(
            "augment: images [B, C, H, W] and labels [B, L, H, W] must share height and width, got "
            f"{list(images.shape)} and {list(labels.shape)}"
        )
    if images.shape[0] != labels.shape[0] or images.device != labels.device:
        raise ValueError(
            "augment: images and labels must share batch and device, got "
            f"{images.shape[0]} on {images.device} and {labels.shape[0]} on {labels.device}"
        )
    _, channels, height, width = images.shape
    batch = images.shape[0] if batch is None else batch
    turn = _orientation(batch, settings, generator)[part]
    if settings.elastic_px == 0 and settings.rotation != "free" and height == width:
        images, labels = _turn_exactly(images, turn), _turn_exactly(labels, turn)
    else:
        field = displacement(batch, height, width, settings, generator, part, images.device)
        rows, columns = _source_coordinates(turn, field)
        images = sample_linear(images, rows, columns)
        labels = sample_nearest(labels, rows, columns)
    grey = torch.randn(2, batch, channels, 1, 1, generator=generator)[:, part].to(images)
    factor, offset = 1 + settings.contrast * grey[0], settings.brightness * grey[1]
    return images * factor + offset, labels


def displacement(
    batch: int,
    height: int,
    width: int,
    settings: Augmentation,
    generator: torch.Generator,
    part: slice = slice(None),
    device: torch.device | None = None,
) -> Tensor:
    """Smooth random displacements [B, 2, H, W], rows then columns, in pixels, of ``part``.

    Normal draws on the coarse grid, whose corners are the image's, interpolated bicubically on
    ``device``.
    """
    n = settings.elastic_grid
    coarse = torch.randn(batch, 2, n, n, generator=generator)[part].to(device) * settings.elastic_px
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)


def sample_linear(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values of ``images`` [B, C, H, W] at pixels [B, H', W'], mirrored outside."""
    height, width = images.shape[2:]
    grid = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], -1)
    return F.grid_sample(
        images,
        grid.to(images.dtype),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=True,
    )


def sample_nearest(labels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of ``labels`` [B, L, H, W] at the nearest pixels to [B, H', W'], mirrored outside."""
    height, width = labels.shape[2:]
    nearest = mirror(rows.round().long(), height) * width + mirror(columns.round().long(), width)
    flat = nearest.flatten(1).unsqueeze(1).expand(-1, labels.shape[1], -1)
    return labels.flatten(2).gather(2, flat).view(*labels.shape[:2], *rows.shape[1:])


def mirror(index: Tensor, size: int) -> Tensor:
    """Indices into 0..size-1 after reflection at the first and last pixel, as often as needed."""
    if size == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * (size - 1))
    return torch.where(index < size, index, 2 * (size - 1) - index)


def _orientation(batch: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """[B, 2] float: angle in quarter turns, and whether to flip first."""
    draws = torch.rand(batch, 2, generator=generator)
    quarters = {
        "none": torch.zeros(batch),
        "quarter": (draws[:, 0] * 4).floor(),
        "free": draws[:, 0] * 4,
    }[settings.rotation]
    return torch.stack([quarters, (draws[:, 1] < 0.5) * float(settings.flip)], 1)


def _turn_exactly(tensor: Tensor, turn: Tensor) -> Tensor:
    """Flip and turn whole pixels of square images."""
    samples = []
    for sample, (quarters, flip) in zip(tensor, turn.tolist(), strict=True):
        flipped = sample.flip(-1) if flip else sample
        samples.append(flipped.rot90(int(quarters), (-2, -1)))
    return torch.stack(samples)


def _source_coordinates(turn: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
    """Where each output pixel comes from: its place, displaced, then turned about the centre."""
    height, width = field.shape[2:]
    angle = turn[:, 0].to(field) * (torch.pi / 2)
    sign = 1 - 2 * turn[:, 1].to(field)
    cos, sin = (f(angle).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=field.device).view(-1, 1) - (height - 1) / 2 + field[:, 0]
    x = torch.arange(width, device=field.device).view(1, -1) - (width - 1) / 2 + field[:, 1]
    rows = cos * y + sin * x + (height - 1) / 2
    columns = sign.view(-1, 1, 1) * (cos * x - sin * y) + (width - 1) / 2
    return rows, columns
