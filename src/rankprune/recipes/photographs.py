"""Photographs, encoded until they are wanted: image folders, parquet files in the hub's layout, data sets of the hub itself."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
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
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_STAND_INS = {"train": (), "test": ("validation", "val"), "validation": ("val", "test")}
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
    """Files by their paths, which stand in one tensor: of a million texts each worker would come to have a copy."""

    paths: Tensor
    ends: Tensor

    @classmethod
    def of(cls, paths: Sequence[str]) -> "_Files":
        encoded = [os.fsencode(path) for path in paths]
        ends = torch.tensor([len(path) for path in encoded]).cumsum(0)
        return cls(torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8), ends)

    def __getitem__(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def name(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(bytes(self.paths[start : int(self.ends[i])].tolist()))


@dataclass(frozen=True)
class _Cells:
    """Cells {"bytes", "path"} as the hub has them: one of an Arrow column, or one of each row of a data set."""

    rows: Any
    column: str | None
    source: str

    def __getitem__(self, i: int) -> bytes:
        cell = (self.rows[i].as_py() if self.column is None else self.rows[i][self.column]) or {}
        if cell.get("bytes") is None and not cell.get("path"):
            raise RankPruneError(f"{self.name(i)} is missing: its cell is empty")
        return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()

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
            RankPruneError: if it is no image, or a damaged one, or not there.
        """
        number = int(self.index[i])
        name = self.encoded.name(number)
        try:
            data = self.encoded[number]
        except OSError as error:
            raise RankPruneError(f"cannot read {name!r}: {error.strerror or error}") from error
        return _decode(data, name)


def load_photographs(source: str | Path, split: str) -> Photographs:
    """Find the photographs of a split, ``"train"``, ``"test"`` or ``"validation"``; the last two stand in for each other.

    Args:
        source: a folder with parquet files named ``train-*.parquet`` in it or in its folder ``data``, with a column of encoded
            images (``img`` or ``image``) and one of labels, as on the Hugging Face hub; or an image folder,
            ``train/<class>/*.jpg``, folders in classes included, whose classes are those of ``train``; or ``"hub:NAME"``, a
            data set of the hub, which `datasets` downloads once. Parquet files are held in memory, encoded; those that do not
            fit are better read by ``"hub:FOLDER"``.

    Raises:
        RankPruneError: if there is none of these, or the split has no labels, or classes that are not in ``train``.
    """
    names = (split, *_STAND_INS.get(split, ()))
    if str(source).startswith(HUB):
        return _labelled(*_read_hub(str(source).removeprefix(HUB).replace("\\", "/"), names), split)
    root = Path(source)
    for folder in (root, root / "data"):
        for name in names:
            if files := sorted(folder.glob(f"{name}-*.parquet")):
                return _labelled(*_read_parquet(files), split)
    folders = [root / name for name in names if (root / name).is_dir()]
    for folder in folders:
        if images := _by_class(folder):
            classes = images if folder.name == "train" else _classes(root / "train") or images
            return _labelled(*_in_classes(images, classes), split)
    if folders:
        raise RankPruneError(f"no images in {str(folders[0])!r}; expected {folders[0].name}/<class>/*.png or .jpg")
    raise RankPruneError(
        f"no {split!r} images under {str(root)!r}: expected files {names[0]}-*.parquet or a folder {names[0]}/<class>/, or, "
        "for a network for small images, the folder cifar-10-batches-py"
    )


def _labelled(encoded: Encoded, labels: list[int], classes: tuple[str, ...], split: str) -> Photographs:
    if min(labels) < 0:
        raise RankPruneError(
            f"the split {split!r} has images without a label; take another one, by `rankprune evaluate --split`, or label them"
        )
    return Photographs(encoded, torch.arange(len(labels)), torch.tensor(labels), classes)


def _by_class(folder: Path) -> dict[str, list[str]]:
    """The images below each folder in `folder`, by its name, where it has any; what begins with a dot is left alone."""
    return {path.name: found for path in _folders(folder) if (found := sorted(_images(path)))}


def _classes(folder: Path) -> list[str]:
    """The names of the folders in `folder` that have images."""
    return [path.name for path in _folders(folder) if any(True for _ in _images(path))]


def _folders(folder: Path) -> list[Path]:
    """Those in `folder` that are not hidden."""
    if not folder.is_dir():
        return []
    shown = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(shown, key=lambda p: p.name)  # paths themselves have another order on Windows


def _images(folder: str | Path) -> Iterator[str]:
    """The paths of the image files below `folder` that are not hidden, in no order."""
    with os.scandir(folder) as entries:  # which knows the kinds of files without asking for each of a million
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _images(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES and entry.is_file():
                yield entry.path


def _in_classes(images: dict[str, list[str]], classes: Iterable[str]) -> tuple[Encoded, list[int], tuple[str, ...]]:
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in images if name not in numbers]
    if unknown:
        where = images[unknown[0]][0]
        raise RankPruneError(f"{where!r} is of the class {unknown[0]!r}, of which train/ has no images")
    found = [(file, numbers[name]) for name, files in images.items() for file in files]
    return _Files.of([path for path, _ in found]), [label for _, label in found], tuple(numbers)


def _read_parquet(files: list[Path]) -> tuple[Encoded, list[int], tuple[str, ...]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "recipes") from error
    tables = []
    for file in files:
        try:
            tables.append(parquet.read_table(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise RankPruneError(f"{str(file)!r} is no parquet file, or a damaged one ({error})") from error
        if tables[-1].schema != tables[0].schema:
            raise RankPruneError(f"{str(file)!r} has other columns than {str(files[0])!r}, or columns of another type")
    table = pyarrow.concat_tables(tables)
    image, label = _columns(table.column_names, str(files[0]))
    labels = _whole_numbers(table[label].to_pylist(), label, str(files[0]))
    if not pyarrow.types.is_struct(table[image].type):
        raise RankPruneError(
            f"the column {image!r} of {str(files[0])!r} does not hold cells of bytes and path, as the hub's do"
        )
    count = max(labels) + 1
    numbered = CIFAR10_CLASSES if count == 10 and image == "img" else tuple(map(str, range(count)))
    return _Cells(table[image], None, str(files[0].parent)), labels, _class_names(table.schema, label) or numbered


def _whole_numbers(labels: list[Any], column: str, source: str) -> list[int]:
    if not labels or not all(isinstance(value, int) and not isinstance(value, bool) for value in labels):
        raise RankPruneError(f"the column {column!r} of {source!r} is empty or has labels that are not whole numbers")
    return labels


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """What `datasets` has noted in a parquet file of the names of its classes."""
    try:
        return tuple(json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (TypeError, KeyError, ValueError):
        return ()


def _read_hub(name: str, names: Sequence[str]) -> tuple[Encoded, list[int], tuple[str, ...]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingExtraError("datasets", "imagenet") from error
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # what it raises where it cannot load
        raise RankPruneError(f"cannot load the data set {name!r} of the hub ({type(error).__name__}: {error})") from error
    split = next((n for n in names if n in splits), None)
    if split is None:
        raise RankPruneError(f"the data set {name!r} has no split {names[0]!r}, but {', '.join(map(str, splits))}")
    data = splits[split]
    image, label = _columns(data.column_names, name)
    labels = _whole_numbers(data[label][:], label, name)
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


def require_pillow() -> None:
    """Make sure that photographs can be decoded.

    Raises:
        MissingExtraError: without Pillow.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pillow", "recipes") from error


def _decode(data: bytes, source: str) -> "Image":
    require_pillow()
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data))
        if picture.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
            picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return picture.convert("RGB")
    except Exception as error:  # whatever its decoders come upon
        raise RankPruneError(f"{source!r} is no image, a damaged one or far too large; remove or replace it") from error


def resized(picture: "Image", size: tuple[int, int], box: Box | None = None) -> Tensor:
    """What is in `box`, or the whole picture, at (width, height) `size` -> (height, width, 3) uint8; bilinear, antialiased."""
    if box is not None or picture.size != size:
        from PIL.Image import Resampling

        picture = picture.resize(size, Resampling.BILINEAR, box)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
