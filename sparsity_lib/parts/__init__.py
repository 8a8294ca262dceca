"""The parts that recipes are made of; importing this package registers them."""

from sparsity_lib.parts import nm, norms, refine, repairs, saliency, scores, select, shift, transforms
from sparsity_lib.parts.base import REGISTRY, Part, Repair, Score, Select, Transform, from_json, part

__all__ = [
    "REGISTRY", "Part", "Repair", "Score", "Select", "Transform", "from_json", "part",
    "nm", "norms", "refine", "repairs", "saliency", "scores", "select", "shift", "transforms",
]
