"""Batches of photographs: random crops to train on, centre crops to test on, decoded by worker processes or kept decoded."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rankprune.errors import RankPruneError
from rankprune.machine import usable_cores
from rankprune.recipes.batches import Batches, Normalize
from rankprune.recipes.photographs import Box, Photographs, require_pillow, resized

if TYPE_CHECKING:
    from rankprune.recipes.photographs import Image


_NAME = f"{RankPruneError.__module__}.{RankPruneError.__qualname__}"


@dataclass(frozen=True)
class PhotographConfig:
    """Where photographs are and what becomes of them.

    `sources` are tried in turn: folders in that of the data, and "hub:NAME" for a data set of the Hugging Face hub; without
    any it is the folder named like the data set. Training crops hold a random share of the picture's area, at least `area`, at
    `sizes` x `sizes` pixels: each of the sizes for an equal part of the epochs. Pictures of the `test_split` have their
    shorter side brought to `test_resize`, and are cropped to the `test_size` pixels in the middle. As many processes as there
    are cores, at most `workers`, decode ahead (under torchrun the processes of the training share the cores); with 0 it is done
    between steps, and pictures that fit into `keep_gb` gigabytes are decoded once.
    """

    sources: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (224,)
    area: float = 0.08
    test_split: str = "validation"
    test_resize: int = 256
    test_size: int = 224
    workers: int = 8
    keep_gb: float = 2.0

    def __post_init__(self) -> None:
        for name in ("sources", "sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # TOML has lists
        if not self.sizes or min(*self.sizes, self.test_size) < 1:
            raise RankPruneError(f"sizes={self.sizes}, test_size={self.test_size}: give at least one, in pixels")
        if not 0 < self.area <= 1:
            raise RankPruneError(f"area={self.area}: give the least share of a picture in a crop, above 0 and at most 1")
        if self.test_resize < self.test_size:
            raise RankPruneError(f"test_resize={self.test_resize} is too small to cut test_size={self.test_size} out of")
        if self.workers < 0 or self.keep_gb < 0:
            raise RankPruneError(f"workers={self.workers}, keep_gb={self.keep_gb}: give 0 or more")

    @classmethod
    def at(cls, size: int, resize: int | None = None, **options: Any) -> "PhotographConfig":
        """Training and test crops of `size` x `size`; the shorter side is 1 / 0.875 of it before, if no `resize` is given."""
        return cls(sizes=(size,), test_resize=round(size / 0.875) if resize is None else resize, test_size=size, **options)

    def size_of(self, epoch: int, epochs: int) -> int:
        """The size of the training crops in one of `epochs` epochs."""
        return self.sizes[epoch * len(self.sizes) // max(1, epochs)]


@dataclass(frozen=True)
class Crops:
    """A batch to make: photographs, `draws` from [0, 1) for each (area, shape, column, row, flip), or none for centre crops."""

    index: list[int]
    draws: list[list[float]] | None


class _Kept:
    """Decoded pictures, as many as fit into so many gigabytes."""

    def __init__(self, gigabytes: float) -> None:
        self._pictures: dict[int, Image] = {}
        self._left = gigabytes * 1e9

    def picture(self, data: Photographs, i: int) -> "Image":
        """Picture `i`, decoded now or before."""
        picture = self._pictures.get(i)
        if picture is None:
            picture = data.picture(i)
            size = 4 * picture.width * picture.height
            if size <= self._left:
                self._pictures[i] = picture
                self._left -= size
        return picture


class _Batches(Dataset):
    """Makes a batch of crops, here or in a worker: images (b, size, size, 3) uint8 and labels (b,)."""

    def __init__(self, data: Photographs, config: PhotographConfig, size: int, kept: _Kept | None) -> None:
        self.data, self.config, self.size, self.kept = data, config, size, kept

    def __getitem__(self, crops: Crops) -> tuple[Tensor, Tensor]:
        pictures = [self.data.picture(i) if self.kept is None else self.kept.picture(self.data, i) for i in crops.index]
        if crops.draws is None:
            boxes = [central_box(*p.size, self.config.test_size / self.config.test_resize) for p in pictures]
        else:
            boxes = [random_box(*p.size, self.config.area, draw) for p, draw in zip(pictures, crops.draws, strict=True)]
        size = (self.size, self.size)
        images = torch.stack([resized(picture, size, box) for picture, box in zip(pictures, boxes, strict=True)])
        if crops.draws is not None:
            flips = torch.tensor([draw[4] < 0.5 for draw in crops.draws])
            images[flips] = images[flips].flip(2)
        return images, self.data.labels[crops.index]


def random_box(width: int, height: int, area: float, draw: list[float]) -> Box:
    """A box of a share of the picture's area from [area, 1) and a shape from 3:4 to 4:3, as far as it fits; anywhere."""
    pixels = (area + draw[0] * (1 - area)) * width * height
    shape = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    across, down = min(width, math.sqrt(pixels * shape)), min(height, math.sqrt(pixels / shape))
    left, top = draw[2] * (width - across), draw[3] * (height - down)
    return left, top, left + across, top + down


def central_box(width: int, height: int, share: float) -> Box:
    """The square in the middle whose side is `share` of the shorter side of the picture."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class PhotographBatches(Batches):
    """Batches of random crops, brought to one size and half of them flipped; the same for any number of workers.

    Args:
        epochs: of the training, over which config.sizes are spread.
        options: see Batches.
    """

    def __init__(self, data: Photographs, batch: int, config: PhotographConfig, epochs: int, **options: Any) -> None:
        super().__init__(data.labels, batch, **options)
        self.data, self.config, self.epochs = data, config, epochs
        self._kept = None if config.workers else _Kept(config.keep_gb)

    @property
    def settings(self) -> dict[str, Any]:
        """What the batches depend on, as plain values."""
        return super().settings | {"sizes": list(self.config.sizes), "area": self.config.area}

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `number` from batch `start` on."""
        order, generator = self._shuffled(number)
        draws = torch.rand(*order.shape, 5, generator=generator)
        crops = (
            Crops(index[self.part].tolist(), draw[self.part].tolist())
            for index, draw in zip(order[start:], draws[start:], strict=True)
        )
        made = _Batches(self.data, self.config, self.config.size_of(number, self.epochs), self._kept)
        yield from _loaded(made, crops, self.normalize, self.device)


def centre_batches(
    data: Photographs,
    config: PhotographConfig,
    batch: int = 100,
    normalize: Normalize | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Centre crops of all photographs in order: images (<= batch, 3, test_size, test_size) float32 and labels."""
    crops = (Crops(index.tolist(), None) for index in torch.arange(len(data)).split(batch))
    return _loaded(_Batches(data, config, config.test_size, None), crops, normalize or Normalize(), device)


def _loaded(
    made: _Batches, crops: Iterable[Crops], normalize: Normalize, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    require_pillow()  # here, for an error's way out of a worker is rough
    on_gpu = torch.device(device).type == "cuda"
    loader = DataLoader(
        made,
        batch_size=None,  # a batch is made as a whole
        sampler=crops,
        num_workers=min(made.config.workers, _cores()),
        pin_memory=on_gpu,
        worker_init_fn=_ignore_damaged_exif,
        generator=torch.Generator(),  # it seeds its workers from this instead of from the global one, which resuming restores
    )
    try:
        for images, labels in loader:
            yield normalize(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
    except RankPruneError as error:  # a worker's comes with the worker's traceback before it
        raise RankPruneError(str(error).strip().splitlines()[-1].removeprefix(f"{_NAME}: ")) from None


def _ignore_damaged_exif(_: int) -> None:
    """Pillow warns of it for pictures that it decodes all the same; ImageNet has some."""
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _cores() -> int:
    """The cores for each process here of a training; more workers than that would only be in each other's way."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
