"""Activation sparsity in large language models: recipes, plans, sparse models.

    recipe (what)  --fit-->  plan (tensors for one model)  --install-->  sparse model (Hugging Face)

Importing the package teaches transformers to load the sparse checkpoints it saves.
"""

from sparsity_lib import methods as recipes
from sparsity_lib.accounting import Account, account, weights_per_token
from sparsity_lib.distributed import distributed
from sparsity_lib.errors import AssetError, SparsityError
from sparsity_lib.fit import fit, fit_many
from sparsity_lib.install import install, installed, uninstall
from sparsity_lib.plan import Plan
from sparsity_lib.recipe import Recipe, Rule
from sparsity_lib.sites import find_sites

__version__ = "0.1.0"

__all__ = [
    "Account", "AssetError", "Plan", "Recipe", "Rule", "SparsityError", "account", "distributed", "find_sites", "fit", "fit_many",
    "install", "installed", "load_model", "recipes", "uninstall", "weights_per_token",
]


def __getattr__(name: str):
    if name == "load_model":  # assets bring datasets and zip handling: only where they are asked for
        from sparsity_lib.assets import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
