"""The data of an experiment: batches to train on, and batches to test with."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rankprune.errors import RankPruneError
from rankprune.recipes.batches import Batches, TrainBatches, eval_batches
from rankprune.recipes.experiment import Experiment
from rankprune.recipes.images import load_images
from rankprune.recipes.labelled import Labelled
from rankprune.recipes.photograph_batches import PhotographBatches, centre_batches
from rankprune.recipes.photographs import HUB, load_photographs
from rankprune.recipes.processes import Processes

Images = TypeVar("Images", bound=Labelled)


@dataclass(frozen=True)
class Data:
    """`test(batch=b)` gives all test images in order, b at a time: images (b, 3, h, w) and labels (b,).

    `source` is which of several sources of photographs they come from; `test_digest` tells small test images from others.
    """

    batches: Batches
    test: Callable[..., Iterator[tuple[Tensor, Tensor]]]
    classes: int
    train_images: int
    test_images: int
    source: str | None = None
    test_digest: int | None = None


def load_data(e: Experiment, folder: Path, processes: Processes) -> Data:
    """The data of `e` below `folder`, on the device of this process, which gets its part of the batches.

    Raises:
        RankPruneError: if there is none, or the batches cannot be divided among the processes.
    """
    options: dict[str, Any] = {
        "seed": e.training.seed,
        "device": processes.device,
        "part": processes.part_of(e.batch),
    }
    config, chosen, place, digest = e.photographs, _source(e, folder), images_of(e, folder), None
    if config is None:
        train, test = _splits(e.holdout, partial(load_images, place), "test")
        digest = test.digest
        batches: Batches = TrainBatches(train, e.batch, **options)
        test_batches = partial(eval_batches, test, device=processes.device)
    else:
        train, test = _splits(e.holdout, partial(load_photographs, place), config.test_split)
        batches = PhotographBatches(train, e.batch, config, e.training.epochs, **options)
        test_batches = partial(centre_batches, test, config, device=processes.device)
    return Data(batches, test_batches, len(train.classes), len(train), len(test), chosen, digest)


def images_of(e: Experiment, folder: Path) -> str | Path:
    """Where its images are.

    Raises:
        RankPruneError: if it names sources and none of them is there.
    """
    return place_of(_source(e, folder) or e.dataset, folder)


def _splits(holdout: int, load: Callable[[str], Images], test_split: str) -> tuple[Images, Images]:
    train = load("train")
    if holdout:
        return train.split(holdout)
    test = load(test_split)
    classes = int(test.labels.max()) + 1
    if classes > len(train.classes):
        raise RankPruneError(f"there are test images of {classes} classes or more, but to train on of {len(train.classes)}")
    return train, test


def _source(e: Experiment, folder: Path) -> str | None:
    """The first of its sources that is there; those of the hub are taken to be. None where it names none."""
    sources = () if e.photographs is None else e.photographs.sources
    found = next((source for source in sources if source.startswith(HUB) or (folder / source).is_dir()), None)
    if sources and found is None:
        raise RankPruneError(f"none of {', '.join(sources)} is a folder in {str(folder)!r}")
    return found


def place_of(source: str, folder: Path) -> str | Path:
    """Where a source or a data set is: on the hub, in its own folder, or `folder` itself, which may have its name."""
    if source.startswith(HUB):
        return source
    inside, name = folder / source, os.path.basename(os.path.abspath(folder))
    return inside if inside.is_dir() and name != source else folder
