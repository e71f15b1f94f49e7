"""Artefacts that come back as they were written, and a clear word on damaged ones."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import rankprune as rp
from rankprune.state_dicts import load_exactly, read_tensors, save_tensors


class Net(nn.Module):
    """A convolution, two linear layers, and an embedding tied to the last of them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(16, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.inner = nn.Linear(width, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.norm(self.conv(self.table(tokens).mT)).relu()
        return self.head(self.inner(y.mT))


TOKENS = torch.arange(10).view(2, 5)


def decomposed(model: nn.Module | None = None) -> tuple[nn.Module, rp.Plan]:
    model = model or Net()
    plan = rp.make_plan(model, rule=rp.FixedRank(3), include=["conv", "inner"], scheme="channel")
    return rp.decompose(model, plan), plan


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    rp.save(tmp_path / "out", *decomposed())
    return tmp_path / "out"


def test_round_trip(tmp_path: Path) -> None:
    small, plan = decomposed()
    small(TOKENS)  # moves the running statistics
    rp.save(tmp_path / "a" / "b", small, plan)
    fresh = Net()
    before, rng = copy.deepcopy(fresh.state_dict()), torch.get_rng_state()
    loaded = rp.load(str(tmp_path / "a" / "b"), fresh)
    assert torch.equal(loaded.eval()(TOKENS), small.eval()(TOKENS))
    assert rp.load_plan(tmp_path / "a" / "b") == plan
    assert loaded.head.weight is loaded.table.weight is not fresh.table.weight
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(fresh.conv, nn.Conv1d)


@pytest.mark.skipif(os.name == "nt", reason="there are no modes")
def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        rp.save(tmp_path, *decomposed())
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("model.safetensors", "rankprune.json"), 0o640
    )


def test_saving_again_replaces(artefact: Path) -> None:
    small, plan = decomposed(Net(32))
    rp.save(artefact, small, plan)
    assert torch.equal(rp.load(artefact, Net(32)).eval()(TOKENS), small.eval()(TOKENS))


def test_golden_names(artefact: Path) -> None:
    assert sorted(p.name for p in artefact.iterdir()) == ["model.safetensors", "rankprune.json"]
    head = json.loads((artefact / "rankprune.json").read_text())
    assert head.keys() == {"format", "architecture", "geometry", "aliases", "buffers", "plan"}
    assert (head["format"], head["architecture"]) == (1, "Net")
    assert head["aliases"] == {"head.weight": "table.weight"}
    assert head["plan"].keys() == {
        *("format", "layers", "macs_dense", "params_dense", "scheme", "rule", "uncounted"),
        *("ms_dense", "ms_measured", "setting", "input_shapes", "calibrated"),
    }
    assert head["plan"]["layers"][1].keys() == {
        *("name", "kind", "shape", "scheme", "rank", "full_rank", "macs_before", "macs_after"),
        *("params_before", "params_after", "error", "reason", "ms_before", "ms_after"),
    }
    with safe_open(artefact / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {
            *("conv.0.weight", "conv.1.weight", "conv.1.bias", "inner.0.weight", "inner.1.weight", "inner.1.bias"),
            *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
            "table.weight",
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    small, plan = decomposed(Net().to(dtype))
    rp.save(tmp_path, small, plan)
    loaded = rp.load(tmp_path, Net())
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(loaded.eval()(TOKENS), small.eval()(TOKENS))


class Positions(nn.Module):
    """Adds a table that no state_dict holds, and keeps another one in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(32.0) / 32, persistent=False)
        self.register_buffer("exact", torch.arange(32.0) / 32, persistent=False)
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x + self.table))


def test_buffers_that_are_not_saved_keep_their_dtypes_too(tmp_path: Path) -> None:
    model = Positions().bfloat16()
    model.exact = model.exact.float()
    plan = rp.make_plan(model, rule=rp.FixedRank(4))
    small = rp.decompose(model, plan)
    rp.save(tmp_path, small, plan)
    fresh, x = Positions(), torch.randn(2, 32).bfloat16()
    loaded = rp.load(tmp_path, fresh)
    assert (loaded.table.dtype, loaded.exact.dtype, fresh.table.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(loaded(x), small(x))
    head = json.loads((tmp_path / "rankprune.json").read_text())
    for damaged in ({"table": "nn"}, ["table"]):
        (tmp_path / "rankprune.json").write_text(json.dumps(head | {"buffers": damaged}))
        with pytest.raises(rp.CheckpointError, match="its buffers are"):
            rp.load(tmp_path, fresh)


def test_a_sparse_buffer_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    plan = rp.make_plan(model, rule=rp.FixedRank(4))
    with pytest.raises(rp.CheckpointError, match=r"'adjacency', a tensor of layout torch\.sparse_coo"):
        rp.save(tmp_path, rp.decompose(model, plan), plan)


def decomposed_all(model: nn.Module) -> tuple[nn.Module, rp.Plan]:
    plan = rp.make_plan(model, rule=rp.FixedRank(2), scheme="channel", include=["*"])
    return rp.decompose(model, plan), plan


def channels_last() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)
    table = torch.arange(12.0).view(3, 4)
    model.register_buffer("head", table[:2])
    model.register_buffer("tail", table[1:])  # overlaps with the other
    flat = torch.arange(6.0)
    model.register_buffer("flat", flat)
    model.register_buffer("grid", flat.view(2, 3))  # all of it, in another shape
    return model


def test_channels_last_and_views_are_saved_whole(tmp_path: Path) -> None:
    small, plan = decomposed_all(channels_last())
    rp.save(tmp_path, small, plan)
    loaded = rp.load(tmp_path, channels_last())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in small.state_dict().items())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * (2 * (27 + 2 * 16 + 144) + 16 * 4) + 2000


def test_memory_format_and_requires_grad_are_those_of_the_fresh_model(tmp_path: Path) -> None:
    rp.save(tmp_path, *decomposed_all(channels_last()))
    fresh = channels_last()
    fresh[0].weight.requires_grad_(False)
    loaded = rp.load(tmp_path, fresh)
    assert [p.requires_grad for p in loaded.parameters()] == [False, False, True, True, True, True]
    assert loaded[1][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_child_named_like_a_wrapper(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("module", nn.Linear(16, 16))
    small, plan = decomposed_all(model)
    rp.save(tmp_path, small, plan)
    x = torch.randn(2, 16)
    assert torch.equal(rp.load(tmp_path, model)(x), small(x))


def test_saving_a_model_that_is_not_the_plans(tmp_path: Path) -> None:
    model = Net()
    small, plan = decomposed(model)
    with pytest.raises(rp.CheckpointError, match=r"'conv' is a Conv1d.*rank 3.*decompose"):
        rp.save(tmp_path, model, plan)
    other = rp.make_plan(model, rule=rp.FixedRank(4), include=["conv", "inner"], scheme="channel")
    with pytest.raises(rp.CheckpointError, match="'conv'"):
        rp.save(tmp_path, small, other)
    assert not list(tmp_path.iterdir())


OTHER_MODELS = {
    "'conv'": lambda: nn.Sequential(nn.Linear(3, 3)),
    r"'conv'.*\(24, 16, 3\).*\(32, 16, 3\)": lambda: Net(32),
    "table.weight has shape.*7, 16": lambda: changed(table=nn.Embedding(7, 16)),
    "more.weight is missing": lambda: changed(more=nn.LayerNorm(4)),
    "norm.weight is not in the model": lambda: changed(norm=nn.Identity()),
}


def changed(**children: nn.Module) -> nn.Module:
    model = Net()
    for name, child in children.items():
        setattr(model, name, child)
    return model


@pytest.mark.parametrize(("said", "build"), OTHER_MODELS.items(), ids=OTHER_MODELS)
def test_wrong_architecture(artefact: Path, said: str, build: Callable) -> None:
    with pytest.raises(rp.CheckpointError, match=said):
        rp.load(artefact, build())


def edit_head(artefact: Path, change: Callable[[dict], object]) -> None:
    head = json.loads((artefact / "rankprune.json").read_text())
    change(head)
    (artefact / "rankprune.json").write_text(json.dumps(head))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "rankprune.json is missing": lambda a: (a / "rankprune.json").unlink(),
    "no file .*model.safetensors": lambda a: (a / "model.safetensors").unlink(),
    "truncated.*save it again": lambda a: cut(a / "model.safetensors", 900),
    "truncated or not a safetensors": lambda a: cut(a / "model.safetensors", 0),
    "not JSON": lambda a: cut(a / "rankprune.json", 300),
    "damaged": lambda a: (a / "rankprune.json").write_bytes(b"\xff\xfe\x00"),
    "not written by rankprune": lambda a: (a / "rankprune.json").write_text('{"format": 1}'),
    "written by rankprune": lambda a: (a / "rankprune.json").write_text("[1, 2]"),
    "format 2, this version reads 1": lambda a: edit_head(a, lambda h: h.update(format=2)),
    "plan of format 1": lambda a: edit_head(a, lambda h: h["plan"].update(format=7)),
    "unknown one": lambda a: edit_head(a, lambda h: h["plan"]["layers"][0].update(colour="red")),
    "tucker": lambda a: edit_head(a, lambda h: h["plan"]["layers"][1].update(scheme="tucker")),
    "rank": lambda a: edit_head(a, lambda h: h["plan"]["layers"][1].update(rank="3")),
    "aliases": lambda a: edit_head(a, lambda h: h.update(aliases=["head.weight"])),
    "geometry": lambda a: edit_head(a, lambda h: h.update(geometry=[3])),
    "conv.0.weight is missing": lambda a: save_file({"x": torch.zeros(1)}, a / "model.safetensors"),
}


@pytest.mark.parametrize(("said", "damage"), DAMAGE.items(), ids=DAMAGE)
def test_damaged_artefact(artefact: Path, said: str, damage: Callable) -> None:
    damage(artefact)
    with pytest.raises(rp.CheckpointError, match=said):
        rp.load(artefact, Net())


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(rp.CheckpointError, match=r"nowhere.*give the folder that save\(\) wrote"):
        rp.load(tmp_path / "nowhere", Net())


def test_batchnorm_of_old_files_lacks_only_its_counter() -> None:
    model = Net()
    tensors = {name: value + 1 for name, value in Net().state_dict().items() if "num_batches" not in name}
    load_exactly(model, tensors, "old.pt")
    assert torch.equal(model.norm.running_mean, torch.ones(24))
    with pytest.raises(rp.CheckpointError, match=r"'old.pt'.*norm.running_mean is missing"):
        load_exactly(model, {n: v for n, v in tensors.items() if n != "norm.running_mean"}, "old.pt")


def test_load_exactly_changes_nothing_when_it_fails() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(rp.CheckpointError, match="surplus"):
        load_exactly(model, {**Net().double().state_dict(), "surplus": torch.zeros(1)}, "x")
    assert all(value.dtype == before[n].dtype and torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_save_tensors_of_a_compiled_model(tmp_path: Path) -> None:
    model = Net()
    aliases = save_tensors(tmp_path / "dense.safetensors", torch.compile(model, backend="eager"))
    assert aliases == {"head.weight": "table.weight"}
    tensors, other = read_tensors(tmp_path / "dense.safetensors"), Net()
    assert tensors.keys() == model.state_dict().keys() - aliases.keys()
    load_exactly(other, tensors, "dense.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_an_artefact_of_an_empty_plan(tmp_path: Path) -> None:
    model = Net()
    plan = rp.make_plan(model, rule=rp.Energy(1.0), include=["inner"])
    assert plan.ranks == {}
    rp.save(tmp_path, rp.decompose(model, plan), replace(plan))
    assert torch.equal(rp.load(tmp_path, Net()).eval()(TOKENS), model.eval()(TOKENS))


class Versioned(nn.Linear):
    """Converts weights of its first format when they are loaded, as some of torchvision's models do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_that_ask_for_their_formats_version_get_it(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), Versioned(8, 8))
    plan = rp.make_plan(model, rule=rp.FixedRank(2))
    rp.save(tmp_path, rp.decompose(model, plan), plan)
    loaded = rp.load(tmp_path, nn.Sequential(nn.Linear(8, 8), Versioned(8, 8)))
    assert torch.equal(loaded[1].weight, model[1].weight)


def test_a_model_that_ties_what_the_artefact_has_apart_is_refused(artefact: Path) -> None:
    small, plan = decomposed(Net())
    small.head.weight = nn.Parameter(torch.randn_like(small.table.weight))
    rp.save(artefact, small, plan)
    with pytest.raises(rp.CheckpointError, match=r"different values for 'table.weight' and 'head.weight'.*without tying"):
        rp.load(artefact, Net())
    apart = Net()
    apart.head.weight = nn.Parameter(torch.zeros_like(apart.table.weight))
    assert torch.equal(rp.load(artefact, apart).head.weight, small.head.weight)


def test_lazy_layers_have_to_run_first(tmp_path: Path) -> None:
    def lazy() -> nn.Sequential:
        return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))

    model, x = lazy(), torch.randn(2, 16)
    model(x)
    small, plan = decomposed_all(model)
    rp.save(tmp_path, small, plan)
    with pytest.raises(rp.RankPruneError, match=r"layer '0' is .*no shape yet; run one forward pass first"):
        rp.load(tmp_path, lazy())
    with pytest.raises(rp.CheckpointError, match=r"0\.weight of the model has no shape yet"):
        load_exactly(lazy(), model.state_dict(), "x")
