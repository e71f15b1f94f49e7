"""Photographs of any size: where they come from, and what is said of those that cannot be read."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rankprune as rp
from example_photographs import CONFIG, Image, folder_of, photograph, png, write_parquet
from rankprune.recipes.data import load_data
from rankprune.recipes.experiment import Experiment
from rankprune.recipes.photograph_batches import (
    PhotographBatches,
)
from rankprune.recipes.photographs import load_photographs
from rankprune.recipes.processes import Processes


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-0.parquet", range(2), [-1, -1])
    write_parquet(tmp_path / "validation-0.parquet", range(3), [0, 1, 1])
    with pytest.raises(rp.RankPruneError, match="'test' has images without a label"):
        load_photographs(tmp_path, "test")
    assert len(load_photographs(tmp_path, "validation")) == 3


def test_validation_images_come_before_test_images(tmp_path: Path) -> None:
    root = folder_of(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val", "test") for name in "ab"))
    names = {split: load_photographs(root, split).encoded.name(0) for split in ("train", "validation", "test")}
    assert {split: Path(name).parts[-3] for split, name in names.items()} == {
        "train": "train",
        "validation": "val",
        "test": "test",
    }


def test_a_split_without_classes_is_passed_over(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/a/0.png", "train/b/0.png", "test/0.png", "val/b/0.png")
    assert load_photographs(root, "test").labels.tolist() == [1]


def test_classes_are_those_of_the_training_images(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/cat/0.png", "train/dog/more/1.TIF", "train/dog/2.png", "val/dog/0.png")
    for left_alone in (".ipynb_checkpoints/0.png", "cat/._0.png", "empty/notes.txt"):
        folder_of(root / "train", left_alone)
    (root / "train" / "cat" / "folder.png").mkdir()
    train = load_photographs(root, "train")
    assert (train.classes, train.labels.tolist()) == (("cat", "dog"), [0, 1, 1])
    assert load_photographs(root, "validation").labels.tolist() == [1]
    folder_of(root, "val/fox/0.png")
    with pytest.raises(rp.RankPruneError, match=r"0\.png' is of the class 'fox', of which train/ has no images"):
        load_photographs(root, "validation")


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    ramp = torch.arange(0, 65536, 257, dtype=torch.int32).view(16, 16).to(torch.uint16)
    Image.fromarray(ramp.numpy()).save(tmp_path / "train" / "a" / "0.png")
    grey = torch.frombuffer(bytearray(load_photographs(tmp_path, "train").picture(0).tobytes()), dtype=torch.uint8)
    assert torch.equal(grey.view(256, 3), torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 3))


def test_far_too_large_an_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path, "train/a/0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(rp.RankPruneError, match=r"0\.png' is no image, a damaged one or far too large"):
        load_photographs(root, "train").picture(0)


def test_a_damaged_image_is_named_whatever_its_decoder_raises(tmp_path: Path) -> None:
    root, file = folder_of(tmp_path, "train/a/0.png"), tmp_path / "train" / "a" / "0.png"
    noise = torch.randint(256, (200, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    second = png(noise).replace(b"IDAT", b"idat").replace(b"idat", b"IDAT", 1).replace(b"idat", b"\x00\x01\x02\x03")
    file.write_bytes(second)
    with pytest.raises(SyntaxError, match="broken PNG"):
        Image.open(io.BytesIO(second)).convert("RGB")
    with pytest.raises(rp.RankPruneError, match=r"0\.png' is no image, a damaged one"):
        load_photographs(root, "train").picture(0)


def test_a_cell_without_an_image_is_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png(photograph(0)), "path": None}, None, {"bytes": None, "path": None}]
    parquet.write_table(arrow.table({"image": cells, "label": [0, 1, 1]}), tmp_path / "train-0.parquet")
    train = load_photographs(tmp_path, "train")
    assert train.picture(0).size
    for i in (1, 2):
        with pytest.raises(rp.RankPruneError, match=f"image {i} of .* is missing"):
            train.picture(i)


@pytest.mark.parametrize("damage", ["pointer", "cut", "overwritten"])
def test_a_parquet_file_that_is_none_is_named(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "train-0.parquet", range(2), [0, 1])
    whole = (tmp_path / "train-0.parquet").read_bytes()
    contents = {
        "pointer": b"version https://git-lfs.github.com/spec/v1",
        "cut": whole[:-100],
        "overwritten": b"PAR1" + bytes(len(whole) - 12) + whole[-8:],
    }
    (tmp_path / "train-1.parquet").write_bytes(contents[damage])
    with pytest.raises(rp.RankPruneError, match=r"train-1\.parquet' is no parquet file, or a damaged one"):
        load_photographs(tmp_path, "train")


def test_parquet_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "train-0.parquet", range(2), [0, 1])
    parquet.write_table(arrow.table({"image": [{"bytes": b"", "path": None}], "label": ["a"]}), tmp_path / "train-1.parquet")
    with pytest.raises(rp.RankPruneError, match=r"train-1\.parquet' has other columns than .*train-0\.parquet'"):
        load_photographs(tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [{"bytes": b"", "path": None}], "label": ["cat"]}, "labels that are not whole numbers"),
        ({"image": [{"bytes": b"", "path": None}], "label": [None]}, "labels that are not whole numbers"),
        ({"image": [{"bytes": b"", "path": None}], "label": [True]}, "labels that are not whole numbers"),
        ({"image": [b""], "label": [0]}, "cells of bytes and path"),
        ({"image": [], "label": []}, "is empty"),
    ],
)
def test_parquet_that_cannot_be_read_as_photographs(tmp_path: Path, columns: dict, said: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(rp.RankPruneError, match=said):
        load_photographs(tmp_path, "train")


def test_parquet_has_the_names_that_datasets_wrote(tmp_path: Path) -> None:
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "fox"])})
    cells = [{"bytes": png(photograph(i)), "path": None} for i in range(2)]
    made = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)
    made.to_parquet(tmp_path / "train-0.parquet")
    assert parquet.read_table(tmp_path / "train-0.parquet").num_rows == 2
    assert load_photographs(tmp_path, "train").classes == ("cat", "dog", "fox")


def test_test_images_of_classes_not_trained_on_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "two" / "train-0.parquet", range(4), [0, 1, 0, 1])
    write_parquet(tmp_path / "two" / "test-0.parquet", range(3), [0, 1, 2])
    e = Experiment("quick", model="resnet18", dataset="two", batch=2, photographs=CONFIG)
    with pytest.raises(rp.RankPruneError, match="test images of 3 classes or more, but to train on of 2"):
        load_data(e, tmp_path, Processes())


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        columns = {"image": [{"bytes": png(photograph(i)), "path": None} for i in numbers], "label": [i % 3 for i in numbers]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / f"{split}-0.parquet")
    train, test = (load_photographs(f"hub:{tmp_path / 'set'}", split) for split in ("train", "test"))
    assert (len(train), train.classes, test.labels.tolist()) == (6, ("a", "b", "c"), [0, 1, 2])
    assert test.picture(1).tobytes() == Image.fromarray(photograph(7).numpy()).tobytes()
    images = [next(iter(PhotographBatches(train, 6, replace(CONFIG, workers=n), 1).epoch(0)))[0] for n in (0, 1)]
    assert torch.equal(*images)
    with pytest.raises(rp.RankPruneError, match="cannot load the data set"):
        load_photographs(f"hub:{tmp_path / 'nowhere'}", "train")
    with pytest.raises(rp.RankPruneError, match="has no split 'third', but train, validation"):
        load_photographs(f"hub:{tmp_path / 'set'}", "third")


@pytest.mark.parametrize("labels", [["cat", "dog"], [0, None]])
def test_a_data_set_of_the_hub_whose_labels_are_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    columns = {"image": [{"bytes": png(photograph(i)), "path": None} for i in range(2)], "label": labels}
    kind = datasets.Value("string" if "cat" in labels else "int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-0.parquet")
    with pytest.raises(rp.RankPruneError, match="labels that are not whole numbers"):
        load_photographs(f"hub:{tmp_path / 'set'}", "train")


def test_a_data_set_of_the_hub_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(rp.RankPruneError, match="cannot load the data set"):
        load_photographs(f"hub:{tmp_path / 'set'}", "train")
