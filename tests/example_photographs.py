"""Photographs for tests: noise of several sizes, and the files that they come in."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rankprune.recipes.photograph_batches import PhotographConfig

Image = pytest.importorskip("PIL.Image")
CONFIG = PhotographConfig(sizes=(8,), test_resize=16, test_size=12, workers=0)


def photograph(i: int) -> Tensor:
    """Noise, of a width and height of its own."""
    return torch.randint(256, (20 + i % 5, 30 - i % 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))


def png(pixels: Tensor) -> bytes:
    Image.fromarray(pixels.numpy()).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def write_parquet(path: Path, numbers: range, labels: list[int]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png(photograph(i)), "path": None} for i in numbers]
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.table({"image": cells, "label": labels}), path)


def folder_of(root: Path, *files: str) -> Path:
    """An image folder; each file is a picture of its own."""
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(png(photograph(i)))
    return root
