"""Image data in its three layouts, and batches against a slow loop over single images."""

import hashlib
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rankprune as rp
from rankprune.recipes.batches import Normalize, TrainBatches, eval_batches
from rankprune.recipes.data import place_of
from rankprune.recipes.images import CIFAR10_CLASSES, ImageSet, load_images

np = pytest.importorskip("numpy")
parquet = pytest.importorskip("pyarrow.parquet")
arrow = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")


def pictures(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "png")
    return buffer.getvalue()


def write_official(folder: Path, old_numpy: bool = False) -> tuple[Tensor, list[int]]:
    folder.mkdir(parents=True)
    images, labels = pictures(18), [i % 10 for i in range(18)]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part = slice(3 * i, 3 * i + 3)
        rows = images[part].permute(0, 3, 1, 2).reshape(3, -1).numpy()
        data = pickle.dumps({"batch_label": name, "data": rows, "labels": labels[part]}, protocol=2)
        (folder / name).write_bytes(data.replace(b"numpy._core", b"numpy.core") if old_numpy else data)
    return images, labels


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("old_numpy", [False, True])
def test_official_files(tmp_path: Path, below: str, old_numpy: bool) -> None:
    images, labels = write_official(tmp_path / "root" / below, old_numpy)
    train, test = (load_images(tmp_path / "root", split) for split in ("train", "test"))
    assert torch.equal(train.images, images[:15])
    assert torch.equal(test.images, images[15:])
    assert train.images.is_contiguous()
    assert (train.labels.tolist(), test.labels.tolist()) == (labels[:15], labels[15:])
    assert train.labels.dtype == torch.int64
    assert train.classes == CIFAR10_CLASSES


def test_incomplete_official_files(tmp_path: Path) -> None:
    write_official(tmp_path / "c")
    (tmp_path / "c" / "data_batch_4").unlink()
    with pytest.raises(rp.RankPruneError, match=r"data_batch_4.*missing"):
        load_images(tmp_path / "c", "train")


@pytest.mark.parametrize("kept", [0, 1000])
def test_damaged_official_files_are_named(tmp_path: Path, kept: int) -> None:
    write_official(tmp_path / "c")
    file = tmp_path / "c" / "data_batch_2"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(rp.RankPruneError, match=r"data_batch_2' is damaged"):
        load_images(tmp_path / "c", "train")


@pytest.mark.parametrize(
    "content", [b"\x80\x02}q\x00\x8c\x01\xff.", b"(lp0\nI1x\n.", pickle.dumps({"labels": []}), pickle.dumps([])]
)
def test_what_official_files_do_not_hold_is_damage(tmp_path: Path, content: bytes) -> None:
    write_official(tmp_path / "c")
    (tmp_path / "c" / "test_batch").write_bytes(content)
    with pytest.raises(rp.RankPruneError, match=r"test_batch' is damaged"):
        load_images(tmp_path / "c", "test")


def test_official_files_need_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path / "c")
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", None)
    monkeypatch.setitem(sys.modules, "numpy._core.multiarray", None)
    with pytest.raises(rp.MissingExtraError, match=r"rankprune\[recipes\]"):
        load_images(tmp_path / "c", "test")


def test_a_split_that_the_official_files_do_not_have(tmp_path: Path) -> None:
    write_official(tmp_path / "c")
    with pytest.raises(rp.RankPruneError, match="no split 'trian'; take 'train' or 'test'"):
        load_images(tmp_path / "c", "trian")


def test_official_files_with_other_objects_are_refused(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    write_official(tmp_path / "c")
    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps({"data": Exploit(), "labels": []}))
    with pytest.raises(rp.RankPruneError, match="refusing to load"):
        load_images(tmp_path / "c", "test")
    assert not (tmp_path / "executed").exists()


def write_parquet(path: Path, images: list[Tensor], labels: list[int], image: str = "img", label: str = "label") -> None:
    cells = [{"bytes": png(picture), "path": None} for picture in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({image: cells, label: labels}), path)


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize(("image", "label", "test"), [("img", "label", "test"), ("image", "labels", "validation")])
def test_parquet(tmp_path: Path, folder: str, image: str, label: str, test: str) -> None:
    images = pictures(7, 8)
    write_parquet(tmp_path / folder / "train-00000-of-00002.parquet", list(images[:3]), [2, 0, 1], image, label)
    write_parquet(tmp_path / folder / "train-00001-of-00002.parquet", list(images[3:5]), [0, 3], image, label)
    write_parquet(tmp_path / folder / f"{test}-00000-of-00001.parquet", list(images[5:]), [1, 2], image, label)
    train = load_images(tmp_path, "train")
    assert torch.equal(train.images, images[:5])
    assert train.labels.tolist() == [2, 0, 1, 0, 3]
    assert train.classes == ("0", "1", "2", "3")
    assert torch.equal(load_images(tmp_path, "test").images, images[5:])


def test_parquet_of_cifar10_has_its_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", list(pictures(10, 4)), list(range(10)))
    assert load_images(tmp_path, "train").classes == CIFAR10_CLASSES


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", list(pictures(2, 4)), [0, 1], label="target")
    with pytest.raises(rp.RankPruneError, match=r"train-0\.parquet.*'target'.*expected"):
        load_images(tmp_path, "train")


def write_folder(root: Path, images: Tensor, labels: list[str]) -> None:
    for i, (picture, label) in enumerate(zip(images, labels, strict=True)):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{i:03}.{'PNG' if i % 2 else 'png'}").write_bytes(png(picture))


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_image_folder(tmp_path: Path, test: str) -> None:
    images = pictures(6, 8)
    write_folder(tmp_path / "train", images[:4], ["cat", "dog", "cat", "fox"])
    write_folder(tmp_path / test, images[4:], ["dog", "fox"])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    train = load_images(tmp_path, "train")
    assert torch.equal(train.images, images[[0, 2, 1, 3]])
    assert (train.labels.tolist(), train.classes) == ([0, 0, 1, 2], ("cat", "dog", "fox"))
    assert torch.equal(load_images(tmp_path, "test").images, images[4:])


def test_labels_mean_the_same_in_both_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", pictures(3, 4), ["cat", "dog", "fox"])
    write_folder(tmp_path / "test", pictures(2, 4), ["cat", "fox"])  # no dog here
    train, test = (load_images(tmp_path, split) for split in ("train", "test"))
    assert [train.classes[i] for i in test.labels.tolist()] == ["cat", "fox"]


def test_grey_images_become_three_channels(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    grey = pictures(1, 6)[0, :, :, 0]
    Image.fromarray(grey.numpy()).save(tmp_path / "train" / "a" / "0.png")
    assert torch.equal(load_images(tmp_path, "train").images[0], grey[:, :, None].expand(-1, -1, 3))


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", pictures(1, 8), ["a"])
    flat = torch.full((6, 12, 3), 77, dtype=torch.uint8)
    (tmp_path / "train" / "a" / "flat.png").write_bytes(png(flat))
    with pytest.raises(rp.RankPruneError, match=r"differ in size \(8 x 8 and 12 x 6\).*--size.*resnet18"):
        load_images(tmp_path, "train")
    resized = load_images(tmp_path, "train", size=8).images
    assert resized.shape == (2, 8, 8, 3)
    assert torch.equal(resized[0], pictures(1, 8)[0])
    assert (resized[1] == 77).all()


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", pictures(1, 8), ["a"])
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(rp.RankPruneError, match=r"broken\.png"):
        load_images(tmp_path, "train")


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(rp.RankPruneError, match=r"no 'test' images under.*expected"):
        load_images(tmp_path, "test")
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(rp.RankPruneError, match="no images in"):
        load_images(tmp_path, "test")


def numbered(count: int, size: int = 8) -> ImageSet:
    return ImageSet(pictures(count, size), torch.arange(count), tuple(map(str, range(count))))


def test_split_is_a_partition_and_repeats() -> None:
    data = numbered(10)
    rest, held = data.split(3, seed=4)
    assert (len(rest), len(held)) == (7, 3)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(10))
    assert all(torch.equal(part.images, data.images[part.labels]) for part in (rest, held))
    assert torch.equal(data.split(3, seed=4)[1].labels, held.labels)
    assert not torch.equal(data.split(3, seed=5)[1].labels, held.labels)
    assert held.classes == data.classes


@pytest.mark.parametrize("holdout", [0, 10, -1])
def test_split_that_leaves_nothing(holdout: int) -> None:
    with pytest.raises(rp.RankPruneError, match=f"holdout={holdout} must be between 1 and 9"):
        numbered(10).split(holdout)


def normalized(picture: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((picture.double() / 255 - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize("pad", [4, 1, 0])
def test_crops_equal_a_loop_over_images(pad: int) -> None:
    data = numbered(11)
    batches = TrainBatches(data, 4, seed=3, pad=pad)
    assert len(batches) == 2
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 5)
    order = torch.randperm(11, generator=generator)
    found = list(batches.epoch(5))
    assert len(found) == 2
    for (images, labels), index in zip(found, (order[:4], order[4:8]), strict=True):
        top, left = torch.randint(2 * pad + 1, (2, 4, 1), generator=generator)[..., 0].tolist()
        flip = torch.randint(2, (4, 1), generator=generator)[:, 0].tolist()
        assert torch.equal(labels, data.labels[index])
        for k in range(4):
            canvas = torch.zeros(8 + 2 * pad, 8 + 2 * pad, 3, dtype=torch.uint8)
            canvas[pad : pad + 8, pad : pad + 8] = data.images[index[k]]
            crop = canvas[top[k] : top[k] + 8, left[k] : left[k] + 8]
            wanted = normalized(crop.flip(1) if flip[k] else crop)
            torch.testing.assert_close(images[k], wanted, rtol=1e-5, atol=1e-5)


def test_without_crops_and_flips_images_are_only_shuffled() -> None:
    data = numbered(8)
    for images, labels in TrainBatches(data, 4, pad=0, flip=False).epoch(0):
        for image, label in zip(images, labels, strict=True):
            torch.testing.assert_close(image, normalized(data.images[label]), rtol=1e-5, atol=1e-5)


def test_half_of_the_images_are_flipped_and_crops_reach_every_offset() -> None:
    ramp = torch.arange(1, 9, dtype=torch.uint8)[None, :, None].expand(8, 8, 3)
    data = ImageSet(ramp.expand(400, 8, 8, 3), torch.zeros(400, dtype=torch.long), ("a",))
    plain = Normalize((0.0,) * 3, (1 / 255,) * 3)
    ((images, _),) = TrainBatches(data, 400, pad=2, normalize=plain).epoch(0)
    middle = images[:, 0, 4]
    flipped = middle[:, 3] > middle[:, 4]
    assert 150 < flipped.sum() < 250
    assert {tuple(row) for row in middle[~flipped].round().int().tolist()} == {
        tuple(v if 1 <= v <= 8 else 0 for v in range(start, start + 8)) for start in range(-1, 4)
    }


def epochs(data: ImageSet, seed: int, *numbers: int) -> list[Tensor]:
    batches = TrainBatches(data, 4, seed=seed)
    return [torch.cat([images for images, _ in batches.epoch(n)]) for n in numbers]


def test_an_epoch_depends_on_seed_and_number_only() -> None:
    data = numbered(8)
    _, second = epochs(data, 1, 0, 1)
    torch.rand(7)
    (alone,) = epochs(data, 1, 1)
    assert torch.equal(alone, second)
    assert not torch.equal(*epochs(data, 1, 0, 1))
    assert not torch.equal(epochs(data, 2, 1)[0], second)
    rng = torch.get_rng_state()
    epochs(data, 1, 0)
    assert torch.equal(torch.get_rng_state(), rng)


def test_batches_of_a_seed_stay_as_they_are_from_version_to_version() -> None:
    """Published results of the CIFAR recipes hold for these batches."""
    data, plain = numbered(40), Normalize((0.0,) * 3, (1 / 255,) * 3)
    digest = hashlib.sha256()
    for number in (0, 5):
        for images, labels in TrainBatches(data, 16, seed=3, normalize=plain).epoch(number):
            digest.update(images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            digest.update(labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "93dbe2631f0b417a"


@pytest.mark.parametrize("start", [0, 1, 3])
def test_an_epoch_can_begin_in_its_middle(start: int) -> None:
    batches = TrainBatches(numbered(13), 4)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, start))
    assert len(rest) == 3 - start
    assert all(torch.equal(a, b) for x, y in zip(whole[start:], rest, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("make", [lambda d: TrainBatches(d, 4).epoch(0), lambda d: eval_batches(d, 4)])
def test_batches_are_float_and_channels_last(make: Callable) -> None:
    for images, labels in make(numbered(8)):
        assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 8, 8), torch.float32, torch.int64)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_eval_batches_are_all_images_in_order() -> None:
    data = numbered(7)
    found = list(eval_batches(data, 3))
    assert [len(labels) for _, labels in found] == [3, 3, 1]
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(7))
    wanted = torch.stack([normalized(picture) for picture in data.images])
    torch.testing.assert_close(torch.cat([images for images, _ in found]), wanted, rtol=1e-5, atol=1e-5)


def test_a_folder_in_the_folder_that_has_its_name_is_not_taken(tmp_path: Path) -> None:
    outer = tmp_path / "flowers"
    (outer / "flowers").mkdir(parents=True)
    (outer / "other").mkdir()
    assert place_of("flowers", outer) == outer
    assert place_of("other", outer) == outer / "other"
    assert place_of("none", outer) == outer
