"""timm: classifiers in their real widths at small images, those of many blocks with few."""

from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.architecture import Architecture, noise

MODELS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "botnet26t_256": {},
    "cait_xxs24_224": {"depth": 4},
    "coat_tiny": {},
    "coatnet_0_rw_224": {"depths": (1, 1, 2, 1), "embed_dim": (32, 64, 96, 128)},
    "convit_tiny": {},
    "convnextv2_atto": {},
    "cs3darknet_s": {},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "deit_tiny_distilled_patch16_224": {"depth": 4},
    "dla46_c": {},
    "dpn48b": {},
    "edgenext_xx_small": {},
    "efficientformerv2_s0": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    "ese_vovnet19b_dw": {},
    "eva02_tiny_patch14_224": {"depth": 4},
    "fastvit_t8": {},
    "gcvit_xxtiny": {},
    "ghostnet_050": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {"stages": (1, 1, 2, 1)},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "lambda_resnet26t": {},
    "levit_128s": {},
    "mambaout_femto": {},
    "mobilenetv4_conv_small": {},
    "mobileone_s0": {},
    "mobilevit_xxs": {},
    "pit_ti_224": {},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "repvit_m0_9": {},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "resmlp_12_224": {},
    "resnest14d": {},
    "rexnet_100": {},
    "sequencer2d_s": {"layers": (1, 1, 2, 1), "embed_dims": (48, 96, 96, 96), "hidden_sizes": (12, 24, 24, 24)},
    "skresnet18": {},
    "starnet_s1": {},
    "swiftformer_xs": {},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 2, 1), "embed_dim": 48},
    "tiny_vit_5m_224": {},
    "tnt_s_patch16_224": {"depth": 2},
    "twins_svt_small": {"depths": (1, 1, 2, 1)},
    "visformer_tiny": {},
    "xcit_nano_12_p16_224": {"depth": 4},
}
"""Names of timm.create_model, and what to change of them."""

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "convmixer": ("ConvMixer", {"dim": 128, "depth": 4, "kernel_size": 7, "patch_size": 7}),
    "focalnet": ("FocalNet", {"embed_dim": 32, "depths": (1, 1, 1, 1)}),
    "mlp_mixer": ("MlpMixer", {"img_size": 64, "num_blocks": 4, "embed_dim": 64}),
    "nest": ("Nest", {"img_size": 64, "embed_dims": (32, 64, 96), "num_heads": (2, 4, 6), "depths": (1, 1, 2)}),
    "volo": ("VOLO", {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (2, 2, 2, 2)}),
}
"""Classes of timm.models, whose names of create_model cannot be changed, and their settings."""

READ = {"convit_tiny": ("*.qk",)}
"""Layers whose weights are read when the network first runs."""

TIED = ("coat_tiny",)
FAST = ("beit_base_patch16_224", "convmixer", "volo")

WIDE = (
    "botnet26t_256",
    "dpn48b",
    "ese_vovnet19b_dw",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "lambda_resnet26t",
    "poolformer_s12",
    "regnetx_002",
    "repvgg_a0",
    "resnest14d",
    "skresnet18",
    "visformer_tiny",
)
"""Those that spatial SVDs would take minutes for."""


def _build(name: str, changes: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        try:
            return timm.create_model(name, num_classes=10, img_size=64, **changes)
        except TypeError:  # most convolutional ones take images of any size
            return timm.create_model(name, num_classes=10, **changes)

    return build


def _build_class(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return getattr(timm.models, name)(num_classes=10, **settings)

    return build


def architectures() -> list[Architecture]:
    """All that the zoo has of timm."""

    builders = {name: _build(name, changes) for name, changes in MODELS.items()}
    builders |= {name: _build_class(*description) for name, description in CLASSES.items()}

    def entry(name: str, build: Callable[[], nn.Module]) -> Architecture:
        scheme = "channel" if name in WIDE else "auto"
        return Architecture(
            name,
            "timm",
            "classification",
            build,
            noise(2, 3, 64, 64),
            fast=name in FAST,
            tied=name in TIED,
            exclude=READ.get(name, ()),
            scheme=scheme,
        )

    return [entry(name, build) for name, build in sorted(builders.items())]
