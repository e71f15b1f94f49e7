"""What is kept of how a dense model was built."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp

pytest.importorskip("huggingface_hub")


from rankprune.integrations.builder import name_of, own_builder
from rankprune.integrations.hub import LowRank
from shareable import MixinNet


@dataclass
class Sizes:
    width: int = 8


class OfSizes(MixinNet):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.width)


class OfSizesOrNot(MixinNet):
    def __init__(self, sizes: "Sizes | None" = None) -> None:
        super().__init__((sizes or Sizes()).width)


class OfSettings(MixinNet):
    def __init__(self, settings: "dict[str, int] | None" = None) -> None:
        super().__init__((settings or {})["width"])


class OfKind(MixinNet):
    def __init__(self, width: int, kind: type[nn.Module]) -> None:
        super().__init__(width)


@pytest.mark.parametrize(
    ("dense", "kept"),
    [
        (OfSizes(Sizes(32)), {}),
        (OfSizesOrNot(Sizes(32)), {}),
        (OfKind(32, nn.ReLU), {}),
        (OfSettings({"width": 32}), {"settings": {"width": 32}}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arguments_that_json_does_not_hold_as_they_were_are_not_kept(dense: MixinNet, kept: dict[str, Any]) -> None:
    plan = rp.make_plan(dense, rule=rp.FixedRank(2))
    low = LowRank(rp.decompose(dense, plan), plan)
    assert (low.builder is not None, low.arguments) == (kept != {}, kept)


def test_a_class_that_nobody_can_import_keeps_its_arguments() -> None:
    class Local(MixinNet):
        def __init__(self, width: int = 8) -> None:
            super().__init__(width)

    dense = Local(width=32)
    plan = rp.make_plan(dense, rule=rp.FixedRank(2))
    low = LowRank(rp.decompose(dense, plan), plan)
    assert (low.builder, low.arguments) == (None, {"width": 32})


def test_a_language_model_generates_as_before(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    dense, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(5).view(1, 5)
    plan = rp.make_plan(dense, {"input_ids": tokens}, rule=rp.FixedRank(4))
    small = rp.decompose(dense, plan)
    small.generation_config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=[7, 8], pad_token_id=0)
    LowRank(small, plan).save_pretrained(tmp_path)
    loaded = LowRank.from_pretrained(tmp_path, transformers.LlamaForCausalLM).model
    assert loaded.generation_config.to_dict() == small.generation_config.to_dict()
    assert torch.equal(loaded.generate(tokens), small.generate(tokens))


def test_a_class_that_needs_more_than_its_config_keeps_no_arguments() -> None:
    transformers = pytest.importorskip("transformers")

    class WithHeads(transformers.BertModel):
        def __init__(self, config: Any, heads: int) -> None:
            super().__init__(config)

    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    assert own_builder(WithHeads(config, 3)) == (None, None)
    assert own_builder(transformers.BertModel(config))[0] == "transformers:BertModel"


def test_a_method_is_named_by_its_class() -> None:
    assert name_of(MixinNet.from_pretrained) == "shareable:MixinNet.from_pretrained"
    for nameless in (MixinNet().forward, functools.partial(MixinNet, 8)):
        with pytest.raises(rp.RankPruneError, match="nobody could import it"):
            name_of(nameless)
