"""Augmentation keeps image and labels aligned, and is what the paper says."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from fastunet.augment import (
    Augmentation,
    augment,
    displacement,
    mirror,
    sample_linear,
    sample_nearest,
)

PLAIN = Augmentation(elastic_px=0, rotation="none", flip=False, contrast=0, brightness=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_drawn_is_identity() -> None:
    images, labels = torch.randn(2, 3, 9, 13), torch.randint(2**31 - 1, (2, 1, 9, 13))
    got = augment(images, labels, PLAIN, generator())
    torch.testing.assert_close(got[0], images, rtol=0, atol=1e-5)
    assert torch.equal(got[1], labels)


@pytest.mark.parametrize("rotation", ["none", "quarter", "free"])
@pytest.mark.parametrize("elastic_px", [0.0, 4.0])
@pytest.mark.parametrize("width", [48, 64])
def test_image_and_labels_stay_aligned(
    rotation: Any, elastic_px: float, width: int, device: torch.device
) -> None:
    # the image says where each of its pixels came from, and so do the labels
    rows = torch.arange(48).view(1, 1, -1, 1).expand(4, 1, 48, width)
    columns = torch.arange(width).view(1, 1, 1, -1).expand(4, 1, 48, width)
    labels = torch.cat([rows, columns], 1).to(device)
    settings = Augmentation(elastic_px=elastic_px, rotation=rotation, contrast=0, brightness=0)
    images, labels = augment(labels.float(), labels, settings, generator())
    inside = (
        (images > 0.6).all(1) & (images[:, 0] < 46.4) & (images[:, 1] < width - 1.6)
    ).unsqueeze(1)
    assert inside.float().mean() > 0.3
    assert ((images - labels).abs() * inside).max() <= 0.5 + 1e-3


def test_orientations() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    settings = Augmentation(elastic_px=0, contrast=0, brightness=0)
    seen = {
        tuple(augment(image, image.long(), settings, generator(seed))[0].flatten().tolist())
        for seed in range(100)
    }
    assert len(seen) == 8
    free = Augmentation(elastic_px=0, rotation="free", contrast=0, brightness=0)
    assert not torch.equal(augment(image, image.long(), free, generator())[0], image)


def test_quarter_turns_agree_with_resampling() -> None:
    image = torch.randn(8, 1, 16, 16)
    exactly = Augmentation(elastic_px=0, contrast=0, brightness=0)
    resampled = Augmentation(elastic_px=1e-9, contrast=0, brightness=0)
    a = augment(image, image.long(), exactly, generator())
    b = augment(image, image.long(), resampled, generator())
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4)


def test_displacements_are_the_papers() -> None:
    settings = Augmentation()
    field = displacement(500, 65, 65, settings, generator())
    assert field.shape == (500, 2, 65, 65)
    at_grid = field[:, :, ::32, ::32]
    assert at_grid.std().item() == pytest.approx(10, rel=0.03)
    # smooth: neighbours move alike
    assert field.diff(dim=2).abs().max() < 4


def test_sampling_matches_scipy() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(20, 30))
    rows, columns = rng.uniform(-30, 50, (2, 1, 25, 25))
    at = np.concatenate([rows, columns])
    tensors = [torch.from_numpy(a) for a in (rows, columns)]
    linear = sample_linear(torch.from_numpy(image)[None, None], *tensors)[0, 0]
    want = ndimage.map_coordinates(image, at, order=1, mode="mirror")
    np.testing.assert_allclose(linear, want, atol=1e-9)
    ids = rng.integers(2**40, size=(20, 30))
    nearest = sample_nearest(torch.from_numpy(ids)[None, None], *tensors)[0, 0]
    got_rows = mirror(tensors[0].round().long(), 20)[0]
    got_columns = mirror(tensors[1].round().long(), 30)[0]
    np.testing.assert_array_equal(nearest, ids[got_rows, got_columns])


def test_mirror_is_numpy_reflect() -> None:
    for size in (1, 2, 3, 7):
        want = np.pad(np.arange(size), 20, mode="reflect")
        got = mirror(torch.arange(-20, size + 20), size)
        np.testing.assert_array_equal(got, want)


def test_seeded_and_the_same_on_every_device(device: torch.device) -> None:
    images, labels = torch.randn(2, 1, 32, 32), torch.randint(9, (2, 2, 32, 32))
    a = augment(images, labels, Augmentation(), generator(3))
    b = augment(images.to(device), labels.to(device), Augmentation(), generator(3))
    # coordinates are rounded otherwise there
    torch.testing.assert_close(a[0], b[0].cpu(), rtol=0, atol=1e-4)
    other = augment(images, labels, Augmentation(), generator(4))
    assert not torch.equal(a[0], other[0])


def test_grey_values() -> None:
    images = torch.randn(300, 1, 8, 8)
    settings = Augmentation(elastic_px=0, rotation="none", flip=False, contrast=0.2, brightness=0.5)
    got = augment(images, images.long(), settings, generator())[0]
    factor = got.std((1, 2, 3)) / images.std((1, 2, 3))
    assert factor.std().item() == pytest.approx(0.2, rel=0.15)
    offset = got.mean((1, 2, 3)) - factor * images.mean((1, 2, 3))
    assert offset.std().item() == pytest.approx(0.5, rel=0.15)


def test_rejects() -> None:
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8).long()
    with pytest.raises(ValueError, match=r"augment: images .* must share height and width"):
        augment(images, labels[..., :7], PLAIN, generator())
    with pytest.raises(ValueError, match="must share batch and device"):
        augment(images, labels[:1], PLAIN, generator())
    for options, message in (
        ({"elastic_px": -1}, "elastic_px must be >= 0"),
        ({"elastic_px": float("nan")}, "elastic_px must be >= 0"),
        ({"elastic_grid": 1}, "elastic_grid must be >= 2"),
        ({"rotation": "45"}, "rotation must be none, quarter or free"),
    ):
        with pytest.raises(ValueError, match=message):
            Augmentation(**options)


def test_check_can_fail() -> None:
    # a field meant for the image alone breaks the alignment that the test above demands
    where = torch.arange(48.0).view(1, 1, -1, 1).expand(1, 1, 48, 48)
    rows = torch.arange(48.0).view(1, -1, 1).expand(1, 48, 48)
    columns = torch.arange(48.0).view(1, 1, -1).expand(1, 48, 48)
    image = sample_linear(where, rows + 2, columns)
    assert ((image - sample_nearest(where.long(), rows, columns)).abs() > 1).any()
