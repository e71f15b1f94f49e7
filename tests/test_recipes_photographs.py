"""Photographs of any size: where they come from, and batches of crops against PIL used by hand."""

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rankprune as rp
from rankprune.recipes.batches import Normalize
from rankprune.recipes.data import load_data
from rankprune.recipes.experiment import Experiment, Folders
from rankprune.recipes.photograph_batches import (
    PhotographBatches,
    PhotographConfig,
    _Kept,
    central_box,
    centre_batches,
    random_box,
)
from rankprune.recipes.photographs import Photographs, load_photographs
from rankprune.recipes.processes import Processes
from rankprune.recipes.progress import Progress
from rankprune.recipes.runner import run
from rankprune.recipes.schedule import TrainConfig

Image = pytest.importorskip("PIL.Image")
RAW = Normalize((0.0,) * 3, (1 / 255,) * 3)
CONFIG = PhotographConfig(sizes=(8,), test_resize=16, test_size=12, workers=0)


def photograph(i: int) -> Tensor:
    """Noise, of a width and height of its own."""
    return torch.randint(256, (20 + i % 5, 30 - i % 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))


def png(pixels: Tensor) -> bytes:
    Image.fromarray(pixels.numpy()).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    for i in range(20):
        path = tmp_path / "train" / "ab"[i // 10] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(photograph(i)))
    return load_photographs(tmp_path, "train")


def test_a_batch_equals_crops_made_by_hand(photographs: Photographs) -> None:
    batches = PhotographBatches(photographs, 6, replace(CONFIG, area=0.3), 2, seed=3, normalize=RAW)
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 1)
    order, draws = torch.randperm(20, generator=generator), torch.rand(3, 6, 5, generator=generator)
    found = list(batches.epoch(1))
    assert len(found) == len(batches) == 3
    for k, (images, labels) in enumerate(found):
        index = order[6 * k : 6 * k + 6]
        assert labels.tolist() == [i // 10 for i in index.tolist()]
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, i, draw in zip(images, index.tolist(), draws[k].tolist(), strict=True):
            picture = Image.fromarray(photograph(i).numpy())
            crop = picture.resize((8, 8), Image.Resampling.BILINEAR, random_box(*picture.size, 0.3, draw))
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw[4] < 0.5 else crop
            expected = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(8, 8, 3)
            assert torch.equal(image.round().to(torch.uint8).permute(1, 2, 0), expected)


def test_batches_are_the_same_for_any_number_of_workers_and_from_the_middle(photographs: Photographs) -> None:
    def drawn(workers: int, start: int = 0, part: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
        config = replace(CONFIG, workers=workers)
        return list(PhotographBatches(photographs, 4, config, 2, part=part).epoch(1, start))

    rng = torch.get_rng_state()
    alone, helped, rest = drawn(0), drawn(2), drawn(2, start=3)
    assert torch.equal(torch.get_rng_state(), rng)
    halves = [drawn(0, part=slice(2)), drawn(0, part=slice(2, 4))]
    assert (len(alone), len(rest)) == (5, 2)
    for k, (images, labels) in enumerate(alone):
        assert torch.equal(helped[k][0], images)
        assert torch.equal(helped[k][1], labels)
        assert torch.equal(torch.cat([half[k][0] for half in halves]), images)
        assert k < 3 or torch.equal(rest[k - 3][0], images)


@pytest.mark.parametrize("area", [0.08, 0.35, 1.0])
def test_random_boxes(area: float) -> None:
    draws = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    for width, height in ((100, 100), (300, 90)):
        boxes = torch.tensor([random_box(width, height, area, draw) for draw in draws], dtype=torch.float64)
        left, top, right, bottom = boxes.unbind(1)
        assert left.min() >= 0 <= top.min()
        assert right.max() <= width + 1e-9
        assert bottom.max() <= height + 1e-9
        across, down = right - left, bottom - top
        whole = (across < width) & (down < height)
        share = (across * down / (width * height))[whole]
        shape = (across / down)[whole]
        assert whole.any() or area == 1
        assert ((share > area - 1e-9) & (share < 1) & (shape > 0.7499) & (shape < 1.3334)).all()
        if area == 0.08:
            assert share.min() < 0.1
            assert shape.min() < 0.77 < 1.3 < shape.max()
            assert left.min() < 0.1 * width < 0.8 * width < right.max()


def test_centre_crops(photographs: Photographs) -> None:
    assert central_box(40, 20, 0.5) == (15, 5, 25, 15)
    found = list(centre_batches(photographs, replace(CONFIG, test_resize=20, test_size=10), 7, normalize=RAW))
    assert [len(labels) for _, labels in found] == [7, 7, 6]
    first = photograph(0)  # 20 x 30: its shorter side has 20 pixels already, so pixels are only cut out
    assert torch.equal(found[0][0][0].round().to(torch.uint8).permute(1, 2, 0), first[5:15, 10:20])
    assert torch.cat([labels for _, labels in found]).tolist() == [0] * 10 + [1] * 10


def test_sizes_take_turns_over_the_epochs(photographs: Photographs) -> None:
    batches = PhotographBatches(photographs, 20, replace(CONFIG, sizes=(4, 6, 8)), 7)
    assert [next(iter(batches.epoch(n)))[0].shape[-1] for n in range(7)] == [4, 4, 4, 6, 6, 8, 8]


def test_decoded_pictures_are_kept_where_they_fit(photographs: Photographs, tmp_path: Path) -> None:
    kept = PhotographBatches(photographs, 20, CONFIG, 9)
    few = PhotographBatches(photographs, 20, replace(CONFIG, keep_gb=1e-5), 9)
    before = [images for images, _ in kept.epoch(0)]
    list(few.epoch(0))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert torch.equal(next(iter(kept.epoch(0)))[0], before[0])
    with pytest.raises(rp.RankPruneError, match=r"cannot read .*png.: No such file"):
        list(few.epoch(0))


def test_large_and_small_pictures_share_the_space(tmp_path: Path) -> None:
    sizes = [100, *[10] * 7]
    for i, size in enumerate(sizes):
        path = tmp_path / "train" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size)).save(path)
    data = load_photographs(tmp_path, "train")
    kept = _Kept(4 * (100**2 + 5 * 10**2) / 1e9)
    for i in range(8):
        kept.picture(data, i)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert [kept.picture(data, i).size[0] for i in range(6)] == sizes[:6]
    with pytest.raises(rp.RankPruneError, match=r"cannot read .*png.: No such file"):
        kept.picture(data, 6)


def test_subsets_and_holdouts(photographs: Photographs) -> None:
    rest, held = photographs.split(4)
    assert (len(rest), len(held)) == (16, 4)
    assert sorted([*rest.index.tolist(), *held.index.tolist()]) == list(range(20))
    picture = held.picture(2)
    assert picture.tobytes() == Image.fromarray(photograph(int(held.index[2])).numpy()).tobytes()


def write_parquet(path: Path, numbers: range, labels: list[int]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png(photograph(i)), "path": None} for i in numbers]
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.table({"image": cells, "label": labels}), path)


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-0.parquet", range(2), [-1, -1])
    write_parquet(tmp_path / "validation-0.parquet", range(3), [0, 1, 1])
    with pytest.raises(rp.RankPruneError, match="'test' has images without a label"):
        load_photographs(tmp_path, "test")
    assert len(load_photographs(tmp_path, "validation")) == 3


def folder_of(root: Path, *files: str) -> Path:
    """An image folder; each file is a picture of its own."""
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(png(photograph(i)))
    return root


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


@pytest.mark.parametrize("config", [CONFIG, None], ids=["photographs", "small images"])
def test_each_process_gets_its_part_of_every_batch(tmp_path: Path, config: PhotographConfig | None) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "two" / f"{split}-0.parquet", range(0, 8 * 35, 35), [0, 1] * 4)  # all of one size
    e = Experiment("quick", model="resnet18" if config else "resnet20", dataset="two", batch=4, photographs=config)
    alone, first, second = (
        list(load_data(e, tmp_path, processes).batches.epoch(0))
        for processes in (Processes(), Processes(0, 2), Processes(1, 2))
    )
    assert len(alone) == 2
    for batch, *parts in zip(alone, first, second, strict=True):
        for whole, *halves in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(halves), whole)


def test_sources_of_which_none_is_there_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", range(4), [0, 1, 0, 1])  # of another data set
    named = replace(CONFIG, sources=("imagenette112", "imagenette"))
    e = Experiment("quick", model="resnet18", dataset="imagenette", batch=2, photographs=named)
    with pytest.raises(rp.RankPruneError, match="none of imagenette112, imagenette is a folder in"):
        load_data(e, tmp_path, Processes())


def test_a_run_does_not_go_on_with_images_of_another_source(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / "large" / f"{split}-0.parquet", range(4), [0, 1, 0, 1])
    e = Experiment(
        "quick",
        method="dense",
        model="resnet18",
        batch=2,
        training=TrainConfig(epochs=2, compile=False),
        photographs=replace(CONFIG, sources=("small", "large")),
    )
    folders = Folders(tmp_path, tmp_path, tmp_path / "runs")

    def kill(progress: Progress) -> None:
        if progress.epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(e, folders, kill)
    (tmp_path / "large").rename(tmp_path / "small")
    with pytest.raises(rp.CheckpointError, match=r"'source': 'large'.*'source': 'small'"):
        run(e, folders)
    (tmp_path / "small").rename(tmp_path / "large")
    assert run(e, folders)["source"] == "large"


def test_a_worker_names_the_damaged_image_in_one_line(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/a/0.png")
    (root / "train" / "a" / "1.png").write_bytes(b"no image")
    batches = PhotographBatches(load_photographs(root, "train"), 2, replace(CONFIG, workers=1), 1)
    with pytest.raises(rp.RankPruneError, match=r"^'.*1\.png' is no image.*replace it$"):
        list(batches.epoch(0))


def test_a_worker_names_the_image_that_is_gone_in_one_line(tmp_path: Path) -> None:
    data = load_photographs(folder_of(tmp_path, "train/a/0.png"), "train")
    next(tmp_path.rglob("0.png")).unlink()
    with pytest.raises(rp.RankPruneError, match=r"^cannot read '.*0\.png': No such file or directory$"):
        list(PhotographBatches(data, 1, replace(CONFIG, workers=1), 1).epoch(0))


def test_without_pillow_its_extra_is_named_also_with_workers(photographs: Photographs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(rp.MissingExtraError, match=r"rankprune\[recipes\]"):
        list(PhotographBatches(photographs, 1, replace(CONFIG, workers=1), 1).epoch(0))


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


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: PhotographConfig(sizes=()), r"sizes=\(\)"),
        (lambda: PhotographConfig(area=0.0), r"area=0\.0"),
        (lambda: PhotographConfig(test_resize=100), "test_resize=100 is too small"),
        (lambda: PhotographConfig(workers=-1), "workers=-1"),
    ],
)
def test_bad_values_are_named(build: Callable, said: str) -> None:
    with pytest.raises(rp.RankPruneError, match=said):
        build()
