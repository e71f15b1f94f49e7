"""Batches of photographs: crops against PIL used by hand, the same for any number of workers and processes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rankprune as rp
from example_photographs import CONFIG, Image, folder_of, photograph, png, write_parquet
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

RAW = Normalize((0.0,) * 3, (1 / 255,) * 3)


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
            assert top.min() < 0.1 * height < 0.8 * height < bottom.max()
            places = torch.stack([left / (width - across), top / (height - down)])[:, whole]
            assert torch.corrcoef(places)[0, 1].abs() < 0.1


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
    with pytest.raises(rp.CheckpointError, match=r"identity\.source is 'large' there, 'small' here"):
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
