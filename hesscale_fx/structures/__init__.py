"""How curvature passes an operator: the structure of its Jacobian (design: four of them).

Nothing here knows graphs, captures or methods.
"""

from hesscale_fx.structures.base import Call, Evaluation, Structure
from hesscale_fx.structures.table import (
    definition_of,
    definitions_for_capture,
    differentiable,
    implementation_of,
    is_known,
    structure_of,
)

__all__ = [
    "Call",
    "Evaluation",
    "Structure",
    "definition_of",
    "definitions_for_capture",
    "differentiable",
    "implementation_of",
    "is_known",
    "structure_of",
]
