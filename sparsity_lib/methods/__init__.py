"""Every method of the book as a recipe: one short file a paper."""

from sparsity_lib.methods.baselines import gate_topk, inputs_topk, oracle, random
from sparsity_lib.methods.cats import cats
from sparsity_lib.methods.claws import VARIANTS, claws
from sparsity_lib.methods.gaussian import gaussian, gaussian_inputs
from sparsity_lib.methods.griffin import griffin
from sparsity_lib.methods.head import head_rule, with_head
from sparsity_lib.methods.larosa import larosa
from sparsity_lib.methods.nm import nm, nm_density, unstructured
from sparsity_lib.methods.rsparse import rsparse
from sparsity_lib.methods.scap import scap, scap_centered, scap_for
from sparsity_lib.methods.spread import combined, spread
from sparsity_lib.methods.teal import teal, teal_greedy, threshold_gap
from sparsity_lib.methods.wina import wina

#: name -> function(density) -> Recipe, for commands and notebooks that take a method by name.
METHODS = {
    "cats": cats,
    "claws": claws,
    "gaussian": gaussian,
    "gaussian_inputs": gaussian_inputs,
    "griffin": griffin,
    "larosa": larosa,
    "inputs_topk": inputs_topk,
    "gate_topk": gate_topk,
    "oracle": oracle,
    "random": random,
    "nm": nm_density,
    "rsparse": rsparse,
    "scap": scap,
    "scap_centered": scap_centered,
    "teal": teal,
    "wina": wina,
}

__all__ = [
    "METHODS", "VARIANTS", "cats", "claws", "combined", "gate_topk", "gaussian", "gaussian_inputs", "griffin", "head_rule",
    "inputs_topk", "larosa", "nm", "nm_density", "oracle", "random", "rsparse", "scap", "scap_centered", "scap_for", "spread",
    "teal", "teal_greedy", "threshold_gap", "unstructured", "wina", "with_head",
]
