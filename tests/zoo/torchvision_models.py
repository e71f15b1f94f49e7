"""torchvision: classifiers, segmentation, detection and video, at small images; large ones narrow or with few blocks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.architecture import Architecture, noise


class BeforeNms(nn.Module):
    """A detector up to the outputs of its heads; the second stage looks at one box for each image, the whole of it.

    Left out is what sorts, crops and suppresses boxes: it has no layers, it needs operators that a torchvision built for
    another PyTorch lacks, and its choices jump where scores are all but equal.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Any]:
        model: Any = self.detector
        found = model.backbone(images)
        features = [found] if isinstance(found, Tensor) else list(found.values())
        if not hasattr(model, "rpn"):
            return [model.head(features)]
        heads = model.roi_heads

        def crop(pool: Any) -> Tensor:
            return F.adaptive_avg_pool2d(features[0], pool.output_size)

        outputs = [model.rpn.head(features), heads.box_predictor(heads.box_head(crop(heads.box_roi_pool)))]
        if heads.mask_predictor is not None:
            outputs.append(heads.mask_predictor(heads.mask_head(crop(heads.mask_roi_pool))))
        if heads.keypoint_predictor is not None:
            outputs.append(heads.keypoint_predictor(heads.keypoint_head(crop(heads.keypoint_roi_pool))))
        return outputs


CLASSIFIERS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "squeezenet1_1": {},
    "shufflenet_v2_x0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "mnasnet0_5": {},
    "regnet_y_400mf": {},
}
"""Models as they are, and settings beside the number of classes."""


def _resnext(models: Any) -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4)


def _densenet(models: Any) -> nn.Module:
    return models.DenseNet(16, (2, 3, 3, 2), 32, num_classes=10)


def _convnext(models: Any) -> nn.Module:
    widths = ((32, 64), (64, 96), (96, 128), (128, None))
    return models.ConvNeXt([models.convnext.CNBlockConfig(c, n, 1) for c, n in widths], num_classes=10)


def _alexnet(models: Any) -> nn.Module:
    return _narrowed(models.alexnet(num_classes=10), 256)


def _vgg(models: Any) -> nn.Module:
    model = models.vgg11_bn(num_classes=10, init_weights=False)
    model.features = models.vgg.make_layers([32, "M", 64, "M", 128, 128, "M", 256, 256, "M"], batch_norm=True)
    return _narrowed(model, 256)


def _narrowed(model: nn.Module, channels: int) -> nn.Module:
    """With a classifier of its usual depth, but narrow: the SVD of 4096 x 25088 would take longer than all the rest."""
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    wide, narrow = 4 * channels, 128
    layers = [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(), nn.Linear(narrow, narrow), nn.ReLU(), nn.Linear(narrow, 10)]
    model.classifier = nn.Sequential(*layers)
    return model


def _vit(models: Any) -> nn.Module:
    return models.VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


def _swin(models: Any) -> nn.Module:
    return models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10)


def _maxvit(models: Any) -> nn.Module:
    return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=10)


def _fcn(models: Any) -> nn.Module:
    parts = models.segmentation.fcn
    trunk = models._utils.IntermediateLayerGetter(models.resnet18(), {"layer4": "out"})
    return parts.FCN(trunk, parts.FCNHead(512, 5))


def _deeplab(models: Any) -> nn.Module:
    return models.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None, num_classes=5)


def _lraspp(models: Any) -> nn.Module:
    return models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)


def _pyramid(models: Any) -> nn.Module:
    trunk, levels = models.mobilenet_v3_small().features, {"3": "0", "8": "1", "12": "2"}
    return models.detection.backbone_utils.BackboneWithFPN(trunk, levels, [24, 48, 576], 64)


def _faster_rcnn(models: Any) -> nn.Module:
    return BeforeNms(models.detection.FasterRCNN(_pyramid(models), 5))


def _mask_rcnn(models: Any) -> nn.Module:
    return BeforeNms(models.detection.MaskRCNN(_pyramid(models), 5))


def _keypoint_rcnn(models: Any) -> nn.Module:
    parts = models.detection.keypoint_rcnn
    heads = {"keypoint_head": parts.KeypointRCNNHeads(64, (64, 64)), "keypoint_predictor": parts.KeypointRCNNPredictor(64, 17)}
    return BeforeNms(parts.KeypointRCNN(_pyramid(models), 2, **heads))


def _retinanet(models: Any) -> nn.Module:
    return BeforeNms(models.detection.RetinaNet(_pyramid(models), 5))


def _fcos(models: Any) -> nn.Module:
    return BeforeNms(models.detection.FCOS(_pyramid(models), 5))


def _ssdlite(models: Any) -> nn.Module:
    return BeforeNms(models.detection.ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=5))


def _r2plus1d(models: Any) -> nn.Module:
    parts = models.video.resnet
    return parts.VideoResNet(parts.BasicBlock, [parts.Conv2Plus1D] * 4, [1, 1, 1, 1], parts.R2Plus1dStem, num_classes=10)


def _swin3d(models: Any) -> nn.Module:
    return models.video.SwinTransformer3d([2, 4, 4], 32, [2, 2], [2, 4], [2, 4, 4], num_classes=10)


def _raft(models: Any) -> nn.Module:
    return models.optical_flow.raft_small()


IMAGES, CLIPS = noise(2, 3, 64, 64), noise(2, 3, 4, 32, 32)

OTHERS: dict[str, tuple[str, Callable[[Any], nn.Module], Callable[[], Any]]] = {
    "resnext": ("classification", _resnext, IMAGES),
    "densenet": ("classification", _densenet, IMAGES),
    "convnext": ("classification", _convnext, IMAGES),
    "alexnet": ("classification", _alexnet, IMAGES),
    "vgg": ("classification", _vgg, IMAGES),
    "vit": ("classification", _vit, IMAGES),
    "swin": ("classification", _swin, IMAGES),
    "maxvit": ("classification", _maxvit, IMAGES),
    "fcn_resnet18": ("segmentation", _fcn, IMAGES),
    "deeplabv3_mobilenet_v3_large": ("segmentation", _deeplab, IMAGES),
    "lraspp_mobilenet_v3_large": ("segmentation", _lraspp, IMAGES),
    "faster_rcnn": ("detection", _faster_rcnn, IMAGES),
    "mask_rcnn": ("detection", _mask_rcnn, IMAGES),
    "keypoint_rcnn": ("detection", _keypoint_rcnn, IMAGES),
    "retinanet": ("detection", _retinanet, IMAGES),
    "fcos": ("detection", _fcos, IMAGES),
    "ssdlite320_mobilenet_v3_large": ("detection", _ssdlite, IMAGES),
    "r2plus1d": ("video", _r2plus1d, CLIPS),
    "swin3d": ("video", _swin3d, CLIPS),
    "raft_small": ("optical flow", _raft, lambda: (noise(1, 3, 128, 128)(), noise(1, 3, 128, 128)(), 2)),
}

FAST = ("convnext", "densenet", "swin")
WIDE = (
    "resnet18",
    "googlenet",
    "inception_v3",
    "regnet_y_400mf",
    "resnext",
    "fcn_resnet18",
    "faster_rcnn",
    "mask_rcnn",
    "r2plus1d",
)
"""Those that spatial SVDs would take minutes for."""


def architectures() -> list[Architecture]:
    """All that the zoo has of torchvision."""

    def entry(name: str, task: str, make: Callable[[Any], nn.Module], inputs: Callable[[], Any]) -> Architecture:
        def build() -> nn.Module:
            from torchvision import models

            return make(models)

        scheme = "channel" if name in WIDE else "auto"
        return Architecture(name, "torchvision", task, build, inputs, fast=name in FAST, scheme=scheme)

    def make_named(name: str, settings: dict[str, Any]) -> Callable[[Any], nn.Module]:
        return lambda models: getattr(models, name)(num_classes=10, **settings)

    side = {"inception_v3": 96}
    found = []
    for name, settings in CLASSIFIERS.items():
        images = noise(2, 3, side.get(name, 64), side.get(name, 64))
        found.append(entry(name, "classification", make_named(name, settings), images))
    return found + [entry(name, *rest) for name, rest in OTHERS.items()]
