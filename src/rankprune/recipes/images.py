"""Image classification data in memory: the official CIFAR-10 files, the hub's parquet layout, or an image folder.

Images are held as one uint8 tensor in NHWC order, so that a batch is a single gather and is channels_last for free.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankprune.errors import MissingExtraError, RankPruneError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet:
    """Images (n, height, width, 3) uint8, their labels (n,) int64, and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "ImageSet":
        """The images at `index`, shape (k,)."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def split(self, holdout: int, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """A random (rest, holdout) partition; the same seed gives the same one.

        Raises:
            RankPruneError: if `holdout` leaves nothing on either side.
        """
        if not 0 < holdout < len(self):
            raise RankPruneError(f"holdout={holdout} must be between 1 and {len(self) - 1}, the number of images less one")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[holdout:].sort().values), self.subset(order[:holdout].sort().values)


def load_images(path: str | Path, split: str, size: int | None = None) -> ImageSet:
    """Read the ``"train"`` or ``"test"`` split found under `path`, whichever of three layouts it has.

    - ``cifar-10-batches-py``: the official python files (``data_batch_1`` ..., ``test_batch``), in `path` or below it;
    - parquet files named ``train-*.parquet`` / ``test-*.parquet`` (or ``validation-*``) in `path` or ``path/data``,
      with a column of encoded images (``img`` or ``image``) and one of labels, as on the Hugging Face hub;
    - an image folder: ``path/train/<class>/*.png`` and ``path/test/...`` (or ``val``).

    Args:
        size: resize every image to size x size pixels. Without it all images must be of one size.

    Raises:
        RankPruneError: if `path` holds none of these, or the images differ in size and no `size` is given.
    """
    root = Path(path)
    names = ("train",) if split == "train" else ("test", "validation", "val")
    official = next((p for p in (root, root / "cifar-10-batches-py") if (p / "data_batch_1").is_file()), None)
    if official:
        return _read_official(official, split)
    for folder in (root, root / "data"):
        for name in names:
            if files := sorted(folder.glob(f"{name}-*.parquet")):
                return _read_parquet(files, size)
    for name in names:
        if (root / name).is_dir():
            splits = [root / split for split in ("train", "test", "validation", "val")]
            classes = {p.name for split in splits if split.is_dir() for p in split.iterdir() if p.is_dir()}
            return _read_folder(root / name, sorted(classes), size)
    raise RankPruneError(
        f"no {split!r} images under {str(root)!r}: expected the folder cifar-10-batches-py, files {names[0]}-*.parquet, "
        f"or a folder {names[0]}/<class>/"
    )


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
    files = [folder / f"data_batch_{i}" for i in range(1, 6)] if split == "train" else [folder / "test_batch"]
    images, labels = [], []
    for file in files:
        if not file.is_file():
            raise RankPruneError(f"{str(file)!r} is missing; unpack the whole official archive")
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="latin1").load()
        images.append(torch.from_numpy(batch["data"]).view(-1, 3, 32, 32).permute(0, 2, 3, 1))
        labels += batch["labels"]
    return ImageSet(torch.cat(images).contiguous(), torch.tensor(labels), CIFAR10_CLASSES)


def _read_parquet(files: list[Path], size: int | None) -> ImageSet:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "recipes") from error
    tables = [parquet.read_table(file) for file in files]
    columns = tables[0].column_names
    image = next((c for c in ("img", "image") if c in columns), None)
    label = next((c for c in ("label", "labels", "fine_label") if c in columns), None)
    if image is None or label is None:
        raise RankPruneError(f"{str(files[0])!r} has columns {columns}; expected one of img, image and one of label, labels")
    pixels = [_decode(cell["bytes"], size, str(files[0].parent)) for table in tables for cell in table[image].to_pylist()]
    labels = [value for table in tables for value in table[label].to_pylist()]
    count = max(labels) + 1
    classes = CIFAR10_CLASSES if count == 10 and image == "img" else tuple(str(i) for i in range(count))
    return ImageSet(_stack(pixels, files[0].parent), torch.tensor(labels), classes)


def _read_folder(folder: Path, classes: list[str], size: int | None) -> ImageSet:
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).glob("*")):
            if file.suffix.lower() in suffixes:
                pixels.append(_decode(file.read_bytes(), size, str(file)))
                labels.append(label)
    if not pixels:
        raise RankPruneError(f"no images in {str(folder)!r}; expected {folder.name}/<class>/*.png or .jpg")
    return ImageSet(_stack(pixels, folder), torch.tensor(labels), tuple(classes))


def _decode(data: bytes, size: int | None, source: str) -> Tensor:
    """Encoded image -> (height, width, 3) uint8."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "recipes") from error
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise RankPruneError(f"{source!r} holds something that is no image, or a damaged one; remove or replace it") from error
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def _stack(pixels: list[Tensor], source: Path) -> Tensor:
    shapes = {tuple(p.shape) for p in pixels}
    if len(shapes) > 1:
        raise RankPruneError(
            f"images under {str(source)!r} differ in size ({sorted(shapes)[:3]}, ...); give a size to resize to"
        )
    return torch.stack(pixels)
