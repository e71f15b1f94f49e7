"""The zoo: networks of torchvision, timm and transformers with random weights, and what to call them with."""

from zoo import timm_models, torchvision_models, transformers_models, unet
from zoo.architecture import Architecture, difference, outputs, run

__all__ = ["ZOO", "Architecture", "difference", "outputs", "run"]

ZOO: dict[str, Architecture] = {
    a.name: a for family in (torchvision_models, timm_models, transformers_models, unet) for a in family.architectures()
}
