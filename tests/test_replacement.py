"""Copies of a model with pairs in it, where modules have methods of their own on the instance."""

from collections import OrderedDict
from types import MethodType

import pytest
import torch
from torch import nn

import rankprune as rp


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_without_pairs_keeps_its_fast_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model = nn.Sequential(OrderedDict(embed=nn.Linear(16, 16), encoder=encoder, head=nn.Linear(16, 4))).eval()
    small = rp.decompose(model, rp.make_plan(model, rule=rp.FixedRank(4), include=["embed"]))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert torch.equal(small.encoder(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding))
