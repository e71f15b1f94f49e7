"""Copies of a model with pairs in it: methods of their own on instances, and the fast paths of transformers."""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from types import MethodType

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.projection import project


@pytest.mark.parametrize("outer", ["", "1"])
def test_a_forward_that_a_copy_would_share_is_refused(outer: str) -> None:
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model = nn.Sequential(nn.Linear(32, 32), inner, nn.Linear(32, 32))
    around = model.get_submodule(outer)
    forward = around.forward
    plan = rp.make_plan(model, rule=rp.FixedRank(2), include=["*"])
    around.forward = lambda x: forward(x)
    with pytest.raises(rp.RankPruneError, match=f"the forward of '{outer or 'the model'}' has been replaced"):
        rp.decompose(model, plan)
    around.forward = MethodType(type(around).forward, around)
    assert rp.count(rp.decompose(model, plan), torch.zeros(1, 32)).macs == 3 * 2 * 64


@pytest.mark.parametrize("outer", ["", "1"])
def test_a_method_that_is_compiled_is_not_in_the_copy(outer: str) -> None:
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model = nn.Sequential(nn.Linear(32, 32), inner, nn.Linear(32, 32))
    around = model.get_submodule(outer)
    around.forward = torch.compile(around.forward, backend="eager")
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2), include=["*"]))
    assert "forward" in vars(around)
    assert rp.count(small, torch.zeros(1, 32)).macs == 3 * 2 * 64


def test_a_decorated_method_that_is_compiled_is_not_in_the_copy() -> None:
    class Decorated(nn.Sequential):
        @no_grad
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = Decorated(nn.Linear(32, 32), nn.ReLU())
    model.forward = torch.compile(model.forward, backend="eager")
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(2), include=["*"]))
    assert rp.count(small, torch.zeros(1, 32)).macs == 2 * 64


def no_grad(function: Callable) -> Callable:
    @wraps(function)
    def wrapper(*args: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return function(*args)

    return wrapper


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_without_pairs_keeps_its_fast_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model = nn.Sequential(OrderedDict(embed=nn.Linear(16, 16), encoder=encoder, head=nn.Linear(16, 4))).eval()
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(4), include=["embed"]))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert torch.equal(small.encoder(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_encoder_still_runs(training: bool) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 3, 16)
    plan = rp.make_plan(model, x, rule=rp.RankFraction(0.25), include=["*"])
    project(model, plan)
    with torch.no_grad():
        assert torch.allclose(rp.decompose(model, plan)(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("exclude", [[], ["layers.0.*"], ["layers.1.*"]])
def test_a_stack_of_encoders_still_runs_with_a_padding_mask(exclude: list[str]) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    inputs = {"src": torch.randn(2, 3, 16), "src_key_padding_mask": padding}
    plan = rp.make_plan(model, inputs, rule=rp.RankFraction(0.25), include=["*"], exclude=exclude)
    project(model, plan)
    with torch.no_grad():
        small, dense = rp.decompose(model, plan)(**inputs), model(**inputs)
    assert torch.allclose(small[~padding], dense[~padding], atol=1e-5)
