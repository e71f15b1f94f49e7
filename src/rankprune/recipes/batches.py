"""Batches from an ImageSet: augmentation of a whole batch as one gather, normalisation, channels_last."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rankprune.errors import RankPruneError
from rankprune.recipes.images import IMAGENET_MEAN, IMAGENET_STD, ImageSet


@dataclass(frozen=True)
class Normalize:
    """uint8 NHWC -> float32 NCHW in channels_last order: (x / 255 - mean) / std."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (b, h, w, 3) uint8 -> (b, 3, h, w) float32."""
        scale = 1 / (255 * torch.tensor(self.std, device=images.device))
        shift = torch.tensor(self.mean, device=images.device) / torch.tensor(self.std, device=images.device)
        return torch.addcmul(-shift, images.float(), scale).permute(0, 3, 1, 2)


class TrainBatches:
    """Shuffled, randomly cropped and flipped batches; the last, incomplete one is dropped.

    An epoch's order and crops depend on `seed` and the epoch's number alone, so a resumed run sees the same batches.

    Args:
        data: the images; moved to `device` once, padded.
        batch: images per batch.
        pad: pixels of black border that crops may reach into; 0 for no crops.
        flip: whether to mirror half of the images.
        part: of every batch, to yield; the whole batch is drawn all the same, so that parts of several processes add up to it.
    """

    def __init__(
        self,
        data: ImageSet,
        batch: int,
        *,
        seed: int = 0,
        pad: int = 4,
        flip: bool = True,
        normalize: Normalize | None = None,
        device: str | torch.device = "cpu",
        part: slice = slice(None),
    ) -> None:
        if batch < 1:
            raise RankPruneError(f"batch={batch}: give at least one image a batch")
        self.pad, self.flip = pad, flip
        self.images = F.pad(data.images, (0, 0, pad, pad, pad, pad)).to(device)
        self.labels = data.labels.to(device)
        self.height, self.width = data.images.shape[1:3]
        self.batch, self.seed, self.part = batch, seed, part
        self.normalize = normalize or Normalize()

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of epoch `number`, or this part of them: images (batch, 3, h, w) float32 and labels (batch,)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for index in order[: len(self) * self.batch].view(-1, self.batch):
            yield self.normalize(self._crop(index, generator)), self.labels[index[self.part]]

    def _crop(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Random crops and flips of this part of the images at `index` (b,) -> (b, height, width, 3) uint8."""
        draws = torch.randint(2 * self.pad + 1, (2, self.batch, 1), generator=generator)
        flip = torch.randint(2, (self.batch, 1), generator=generator).bool() & self.flip
        rows = draws[0] + torch.arange(self.height)  # (b, height)
        across = torch.arange(self.width)
        columns = draws[1] + torch.where(flip, self.width - 1 - across, across)  # (b, width)
        index, rows, columns = (each[self.part].to(self.images.device) for each in (index, rows, columns))
        return self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def eval_batches(
    data: ImageSet, batch: int = 500, normalize: Normalize | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, unaugmented: images (<= batch, 3, h, w) float32 and labels."""
    normalize = normalize or Normalize()
    for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
        yield normalize(images.to(device)), labels.to(device)
