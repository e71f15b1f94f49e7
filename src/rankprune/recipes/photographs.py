"""Photographs, encoded until they are wanted: image folders, parquet files in the hub's layout, data sets of the hub itself."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rankprune.errors import MissingExtraError, RankPruneError
from rankprune.recipes.labelled import Labelled

if TYPE_CHECKING:
    from PIL.Image import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB = "hub:"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels, not rounded."""


class Encoded(Protocol):
    """Image files by number, wherever they are; picklable, for worker processes."""

    def __getitem__(self, i: int, /) -> bytes: ...

    def name(self, i: int) -> str:
        """What to call image `i` in an error."""
        ...


@dataclass(frozen=True)
class _Files:
    paths: Sequence[str]

    def __getitem__(self, i: int) -> bytes:
        return Path(self.paths[i]).read_bytes()

    def name(self, i: int) -> str:
        return self.paths[i]


@dataclass(frozen=True)
class _Cells:
    """Cells {"bytes", "path"} as the hub has them: one of an Arrow column, or one of each row of a data set."""

    rows: Any
    column: str | None
    source: str

    def __getitem__(self, i: int) -> bytes:
        cell = self.rows[i].as_py() if self.column is None else self.rows[i][self.column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def name(self, i: int) -> str:
        return f"image {i} of {self.source}"


@dataclass(frozen=True)
class Photographs(Labelled):
    """Images of any size, decoded when asked for; `index` (n,) says which of `encoded` they are."""

    encoded: Encoded
    index: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def subset(self, index: Tensor) -> "Photographs":
        """The photographs at `index`, shape (k,)."""
        return Photographs(self.encoded, self.index[index], self.labels[index], self.classes)

    def picture(self, i: int) -> "Image":
        """Decode photograph `i`.

        Raises:
            RankPruneError: if it is no image, or a damaged one.
        """
        number = int(self.index[i])
        return _decode(self.encoded[number], self.encoded.name(number))


def load_photographs(source: str | Path, split: str) -> Photographs:
    """Find the photographs of a split, ``"train"``, ``"test"`` or ``"validation"``; the last two stand in for each other.

    Args:
        source: a folder with parquet files named ``train-*.parquet`` in it or in its folder ``data``, with a column of encoded
            images (``img`` or ``image``) and one of labels, as on the Hugging Face hub; or an image folder,
            ``train/<class>/*.jpg``; or ``"hub:NAME"``, a data set of the hub, which `datasets` downloads once.
            Parquet files are held in memory, encoded; those that do not fit are better read by ``"hub:FOLDER"``.

    Raises:
        RankPruneError: if there is none of these, or the split has no labels.
    """
    names = ("train",) if split == "train" else (split, *(n for n in ("test", "validation", "val") if n != split))
    if str(source).startswith(HUB):
        return _labelled(*_read_hub(str(source).removeprefix(HUB), names), split)
    root = Path(source)
    for folder in (root, root / "data"):
        for name in names:
            if files := sorted(folder.glob(f"{name}-*.parquet")):
                return _labelled(*_read_parquet(files), split)
    for name in names:
        if (root / name).is_dir():
            splits = [root / each for each in ("train", "test", "validation", "val")]
            classes = {p.name for each in splits if each.is_dir() for p in each.iterdir() if p.is_dir()}
            return _labelled(*_read_folder(root / name, sorted(classes)), split)
    raise RankPruneError(
        f"no {split!r} images under {str(root)!r}: expected the folder cifar-10-batches-py, files {names[0]}-*.parquet, "
        f"or a folder {names[0]}/<class>/"
    )


def _labelled(encoded: Encoded, labels: list[int], classes: tuple[str, ...], split: str) -> Photographs:
    if min(labels) < 0:
        raise RankPruneError(f"the split {split!r} has images without a label; take another one, like 'validation'")
    return Photographs(encoded, torch.arange(len(labels)), torch.tensor(labels), classes)


def _read_folder(folder: Path, classes: list[str]) -> tuple[Encoded, list[int], tuple[str, ...]]:
    found = [
        (str(file), label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise RankPruneError(f"no images in {str(folder)!r}; expected {folder.name}/<class>/*.png or .jpg")
    return _Files([path for path, _ in found]), [label for _, label in found], tuple(classes)


def _read_parquet(files: list[Path]) -> tuple[Encoded, list[int], tuple[str, ...]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "recipes") from error
    table = pyarrow.concat_tables([parquet.read_table(file) for file in files])
    image, label = _columns(table.column_names, str(files[0]))
    labels = table[label].to_pylist()
    count = max(labels) + 1
    classes = CIFAR10_CLASSES if count == 10 and image == "img" else tuple(str(i) for i in range(count))
    return _Cells(table[image], None, str(files[0].parent)), labels, classes


def _read_hub(name: str, names: Sequence[str]) -> tuple[Encoded, list[int], tuple[str, ...]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "imagenet") from error
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError) as error:  # what it raises for unknown names, without a network, and for data it cannot read
        raise RankPruneError(f"cannot load the data set {name!r} of the hub ({type(error).__name__}: {error})") from error
    split = next((n for n in names if n in splits), None)
    if split is None:
        raise RankPruneError(f"the data set {name!r} has no split {names[0]!r}, but {', '.join(map(str, splits))}")
    data = splits[split]
    image, label = _columns(data.column_names, name)
    labels = list(data[label])
    feature = data.features[label]
    classes = tuple(feature.names) if hasattr(feature, "names") else tuple(str(i) for i in range(max(labels) + 1))
    return _Cells(data.cast_column(image, datasets.Image(decode=False)).select_columns([image]), image, name), labels, classes


def _columns(names: Sequence[str], source: str) -> tuple[str, str]:
    """The names of the columns that hold the images and the labels."""
    image = next((c for c in ("img", "image") if c in names), None)
    label = next((c for c in ("label", "labels", "fine_label") if c in names), None)
    if image is None or label is None:
        raise RankPruneError(f"{source!r} has columns {list(names)}; expected one of img, image and one of label, labels")
    return image, label


def _decode(data: bytes, source: str) -> "Image":
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "recipes") from error
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise RankPruneError(f"{source!r} is no image, or a damaged one; remove or replace it") from error


def resized(picture: "Image", size: tuple[int, int], box: Box | None = None) -> Tensor:
    """What is in `box`, or the whole picture, at (width, height) `size` -> (height, width, 3) uint8; bilinear, antialiased."""
    if box is not None or picture.size != size:
        from PIL.Image import Resampling

        picture = picture.resize(size, Resampling.BILINEAR, box)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
