"""Image classification data decoded in memory: the official CIFAR-10 files, or photographs all brought to one size.

Images are held as one uint8 tensor in NHWC order, so that a batch is a single gather and is channels_last for free.
"""

import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankprune.errors import MissingExtraError, RankPruneError
from rankprune.recipes.labelled import Labelled
from rankprune.recipes.photographs import CIFAR10_CLASSES, Photographs, load_photographs, resized

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet(Labelled):
    """Images (n, height, width, 3) uint8, their labels (n,) int64, and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def subset(self, index: Tensor) -> "ImageSet":
        """The images at `index`, shape (k,)."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    @property
    def digest(self) -> int:
        """A checksum of all pixels: the same pictures encoded in another way mostly have another one."""
        return zlib.crc32(self.images.contiguous().numpy().data)


def load_images(path: str | Path, split: str, size: int | None = None) -> ImageSet:
    """Read the ``"train"`` or ``"test"`` split found under `path`, all of it.

    It is in the official python files of CIFAR-10 (``data_batch_1`` ..., ``test_batch``), in `path` or in its folder
    ``cifar-10-batches-py``, or anything that load_photographs reads.

    Args:
        size: resize every image to size x size pixels. Without it all images must be of one size.

    Raises:
        RankPruneError: if `path` holds none of these, or the images differ in size and no `size` is given.
    """
    root = Path(path)
    official = next((p for p in (root, root / "cifar-10-batches-py") if (p / "data_batch_1").is_file()), None)
    return _read_official(official, split) if official else _decoded(load_photographs(path, split), size, str(path))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, nothing else: the official files need no more."""

    allowed = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise RankPruneError(f"a CIFAR-10 file holds {module}.{name}, which the official files do not; refusing to load it")
        return super().find_class(module, name)


def _read_official(folder: Path, split: str) -> ImageSet:
    if split not in ("train", "test"):
        raise RankPruneError(
            f"the official CIFAR-10 files under {str(folder)!r} have no split {split!r}; take 'train' or 'test'"
        )
    files = [folder / f"data_batch_{i}" for i in range(1, 6)] if split == "train" else [folder / "test_batch"]
    images, labels = [], []
    for file in files:
        if not file.is_file():
            raise RankPruneError(f"{str(file)!r} is missing; unpack the whole official archive")
        try:
            with file.open("rb") as stream:
                batch = _ArrayUnpickler(stream, encoding="latin1").load()
            images.append(torch.from_numpy(batch["data"]).view(-1, 3, 32, 32).permute(0, 2, 3, 1))
            labels += batch["labels"]
        except (RankPruneError, OSError):
            raise
        except ImportError as error:
            raise MissingExtraError("numpy", "recipes") from error
        except Exception as error:  # what a damaged pickle raises depends on the byte
            raise RankPruneError(
                f"{str(file)!r} is damaged ({type(error).__name__}: {error}); unpack the official archive again"
            ) from error
    return ImageSet(torch.cat(images).contiguous(), torch.tensor(labels), CIFAR10_CLASSES)


def _decoded(photographs: Photographs, size: int | None, source: str) -> ImageSet:
    pixels: list[Tensor] = []
    for picture in (photographs.picture(i) for i in range(len(photographs))):
        pixels.append(resized(picture, picture.size if size is None else (size, size)))
        if pixels[-1].shape != pixels[0].shape:  # before thousands of photographs are decoded
            height, width, _ = pixels[0].shape
            raise RankPruneError(
                f"images under {source!r} differ in size ({width} x {height} and {picture.width} x {picture.height}): "
                "bring them to one size first, or take crops of any, by `rankprune evaluate --size` and by training a "
                "network for photographs, like resnet18"
            )
    return ImageSet(torch.stack(pixels), photographs.labels, photographs.classes)
