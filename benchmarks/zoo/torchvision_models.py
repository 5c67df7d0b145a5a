"""Image, segmentation and video models of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import CASES, Case
from zoo.vision import import_torchvision


def add(
    name: str,
    model: str,
    shape: tuple[int, ...],
    loss: Callable | None = None,
    labels: tuple[int, ...] = (),
    **options: Any,
) -> None:
    """Register a model by its name in torchvision."""

    def build() -> Case:
        models = import_torchvision().models
        net = models.get_model(model, weights=None, num_classes=3, **options).double().train()
        images = torch.randn(2, *shape, dtype=torch.float64)
        return Case(net, loss or nn.CrossEntropyLoss(), (images, torch.randint(3, (2, *labels))))

    CASES[f"torchvision {name}"] = build


def with_auxiliary(out: Any, y: Tensor) -> Tensor:
    """GoogLeNet and Inception have classifiers half way."""
    heads = [(out.logits, 1.0)] + [(v, 0.3) for k, v in out._asdict().items() if k != "logits"]
    return sum(w * F.cross_entropy(v, y) for v, w in heads)


def of_pixels(out: dict[str, Tensor], y: Tensor) -> Tensor:
    """A class for each pixel."""
    return F.cross_entropy(out["out"], y)


def square(n: int) -> tuple[int, int, int]:
    """The shape of a picture."""
    return (3, n, n)


add("ResNet-18", "resnet18", square(32))
add("SqueezeNet", "squeezenet1_1", square(32))
add("GoogLeNet", "googlenet", square(64), with_auxiliary, init_weights=False, aux_logits=True)
add("MobileNetV2", "mobilenet_v2", square(32), width_mult=0.25)
add("MobileNetV3", "mobilenet_v3_small", square(32))
add("ShuffleNetV2", "shufflenet_v2_x0_5", square(32))
add("MNASNet", "mnasnet0_5", square(32))
add("EfficientNet-B0", "efficientnet_b0", square(32))
add("RegNetX", "regnet_x_400mf", square(32))
add("DeepLabV3", "deeplabv3_mobilenet_v3_large", square(32), of_pixels, (32, 32),
    weights_backbone=None)  # fmt: skip
add("FCN", "fcn_resnet50", square(32), of_pixels, (32, 32), weights_backbone=None)
add("LR-ASPP", "lraspp_mobilenet_v3_large", square(32), of_pixels, (32, 32),
    weights_backbone=None)  # fmt: skip
add("R3D", "r3d_18", (3, 4, 16, 16))
add("MC3", "mc3_18", (3, 4, 16, 16))
add("R(2+1)D", "r2plus1d_18", (3, 4, 16, 16))


def small(name: str, build: Callable[[Any], nn.Module], shape: tuple[int, ...]) -> None:
    """Register a model by its class."""

    def make() -> Case:
        net = build(import_torchvision().models).double().train()
        images = torch.randn(2, *shape, dtype=torch.float64)
        return Case(net, nn.CrossEntropyLoss(), (images, torch.randint(3, (2,))))

    CASES[f"torchvision {name}"] = make


def _convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=3)


def _head(net: nn.Module, width: int) -> nn.Module:
    """In place of three layers of 4096."""
    net.classifier = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    return net


small(
    "VGG",
    lambda m: _head(m.VGG(m.vgg.make_layers([8, "M", 16, "M"]), init_weights=False), 16 * 49),
    square(32),
)
small("AlexNet", lambda m: _head(m.AlexNet(), 256 * 36), square(64))
small("ConvNeXt", _convnext, square(32))
small(
    "Inception v3",
    lambda m: m.inception_v3(init_weights=False, aux_logits=False, num_classes=3),
    square(96),
)
small("ViT", lambda m: m.VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=3), square(16))
small(
    "Swin",
    lambda m: m.SwinTransformer([2, 2], 4, [1, 1], [1, 2], [4, 4], num_classes=3),
    square(16),
)
small(
    "ResNeXt",
    lambda m: m.ResNet(m.resnet.Bottleneck, [1, 1, 1, 1], 3, groups=4, width_per_group=4),
    square(32),
)
small("DenseNet", lambda m: m.DenseNet(4, (2, 2), 8, num_classes=3), square(32))
small(
    "MaxViT",
    lambda m: m.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.1, num_classes=3),
    square(32),
)
