"""Tiny images whose colour is their label, and the files that data sets of images come in."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rankprune.recipes.images import ImageSet


def coloured(count: int, size: int = 6, seed: int = 0) -> ImageSet:
    """Noise around one of four colours, which is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    colours = torch.tensor([[60, 60, 60], [190, 60, 60], [60, 190, 60], [60, 60, 190]])
    noise = torch.randint(-50, 50, (count, size, size, 3), generator=generator)
    images = (colours[labels][:, None, None] + noise).to(torch.uint8)
    return ImageSet(images, labels, ("grey", "red", "green", "blue"))


def write_parquet(path: Path, data: ImageSet) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")

    def png(picture: Tensor) -> dict:
        image.fromarray(picture.numpy()).save(buffer := io.BytesIO(), "png")
        return {"bytes": buffer.getvalue(), "path": None}

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"img": [png(p) for p in data.images], "label": data.labels.tolist()}), path)
