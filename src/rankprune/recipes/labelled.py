"""What every set of labelled images can do, whether it holds them decoded or not."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from rankprune.errors import RankPruneError


class Labelled(ABC):
    """Has labels (n,) int64, and the names of the classes."""

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def subset(self, index: Tensor) -> Self:
        """The images at `index`, shape (k,)."""

    def split(self, holdout: int, seed: int = 0) -> tuple[Self, Self]:
        """A random (rest, holdout) partition; the same seed gives the same one.

        Raises:
            RankPruneError: if `holdout` leaves nothing on either side.
        """
        if not 0 < holdout < len(self):
            raise RankPruneError(f"holdout={holdout} must be between 1 and {len(self) - 1}, the number of images less one")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[holdout:].sort().values), self.subset(order[:holdout].sort().values)
