"""Real models, tiny and with random weights, each with its loss and one batch.

``CASES`` maps a name to a function that builds a `Case`. Three of the files import a package
(transformers, timm, torchvision) when their models are built, not before.
"""

from zoo.case import CASES, Case

from zoo import classics, language, timm_models, torchvision_models  # isort: skip

__all__ = ["CASES", "Case", "classics", "language", "timm_models", "torchvision_models"]
