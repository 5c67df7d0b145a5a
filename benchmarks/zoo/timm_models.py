"""Image models of the package timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.case import CASES, Case
from zoo.vision import import_torchvision


def add(name: str, model: str, size: int, **options: Any) -> None:
    """Register a model by its name in timm."""

    def build() -> Case:
        import_torchvision()  # timm imports it
        import timm

        net = timm.create_model(model, num_classes=3, **options).double().train()
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        return Case(net, nn.CrossEntropyLoss(), (images, torch.randint(3, (2,))))

    CASES[f"timm {name}"] = build


TINY = {"embed_dim": 8, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}

add("ResNet", "resnet10t", 32)
add("ResNet, test size", "test_resnet", 32)
add("ResNeXt", "resnext26ts", 32)
add("SE-ResNet", "seresnet18", 32)
add("DenseNet", "densenet121", 32, growth_rate=4, block_config=(2, 2))
add("Inception v3", "inception_v3", 96)
add("MobileNetV2", "mobilenetv2_035", 32)
add("MobileNetV3", "mobilenetv3_small_050", 32)
add("EfficientNet", "test_efficientnet", 32)
add("EfficientNet-B0", "efficientnet_b0", 32)
add("RegNetX", "regnetx_002", 32)
add("RegNetY", "regnety_002", 32)
add("ConvNeXt", "test_convnext", 32)
add("ConvNeXt V2", "test_convnext2", 32)
add("NFNet", "test_nfnet", 32)
add("ByobNet", "test_byobnet", 32)
add("RepVGG", "repvgg_a0", 32)
add("GhostNet", "ghostnet_050", 32)
add("HRNet", "hrnet_w18_small", 32)
add("ViT", "vit_tiny_patch16_224", 16, **TINY)
add("DeiT, distilled", "deit_tiny_distilled_patch16_224", 16, **TINY)
add("ViT, global pooling", "test_vit2", 32)
add("CaiT", "cait_xxs24_224", 16, **TINY)
add("BEiT", "beit_base_patch16_224", 16, **TINY)
add("Swin", "swin_tiny_patch4_window7_224", 16, img_size=16, patch_size=2, window_size=4,
    embed_dim=4, depths=(2, 1), num_heads=(1, 2))  # fmt: skip
add("Swin V2", "swinv2_tiny_window8_256", 16, img_size=16, patch_size=2, window_size=4,
    embed_dim=4, depths=(2, 1), num_heads=(1, 2))  # fmt: skip
add("MaxViT", "maxvit_pico_rw_256", 64, img_size=64)
add("CoAtNet", "coatnet_pico_rw_224", 64, img_size=64)
add("MambaOut", "test_mambaout", 32)
add("XCiT", "xcit_nano_12_p16_224", 32, img_size=32, embed_dim=8, depth=2, num_heads=2)
add("PVT v2", "pvt_v2_b0", 32)
add("EdgeNeXt", "edgenext_xx_small", 32)
add("MobileViT", "mobilevit_xxs", 32)


def small(name: str, build: Callable[[Any], nn.Module], size: int) -> None:
    """Register a model by its class."""

    def make() -> Case:
        import_torchvision()
        import timm

        net = build(timm.models).double().train()
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        return Case(net, nn.CrossEntropyLoss(), (images, torch.randint(3, (2,))))

    CASES[f"timm {name}"] = make


MIXER = {"num_classes": 3, "img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": 8}

small("MLP-Mixer", lambda m: m.MlpMixer(**MIXER), 16)
small("gMLP", lambda m: m.MlpMixer(**MIXER, mlp_ratio=4, block_layer=m.mlp_mixer.SpatialGatingBlock,
      mlp_layer=m.mlp_mixer.GatedMlp), 16)  # fmt: skip
small("ResMLP", lambda m: m.MlpMixer(**MIXER, mlp_ratio=4, block_layer=m.mlp_mixer.ResBlock,
      norm_layer=m.mlp_mixer.Affine), 16)  # fmt: skip
small("PoolFormer", lambda m: m.MetaFormer(depths=(1, 1), dims=(4, 8), num_classes=3,
      token_mixers=m.metaformer.Pooling), 32)  # fmt: skip
small("VGG", lambda m: m.VGG([8, "M", 16, "M"], num_classes=3, mlp_ratio=0.005,
      norm_layer=nn.BatchNorm2d), 32)  # fmt: skip
small("FocalNet", lambda m: m.FocalNet(num_classes=3, embed_dim=8, depths=(1, 1),
      focal_levels=(2, 2), focal_windows=(3, 3)), 32)  # fmt: skip
