"""Small networks that were trained for this book (`make results R=smallnets`), kept with it and checked before use."""

from __future__ import annotations

from pathlib import Path

from sparsity_lib import project, results
from sparsity_lib.assets.cache import sha256_of
from sparsity_lib.errors import AssetError, unknown

#: Names that `load_model` accepts: language models of about 1.3 million weights, and a ViT for 8 x 8 digits.
SMALL = (
    "small-gpt2", "small-falcon", "small-mpt", "small-llama", "small-llama-relu", "small-mixtral", "small-mamba2", "small-vit",
)
#: The result whose manifest says how they came about, with the checksum of every file.
RESULT = "smallnets"
_FIX = f"Fix: git checkout results/models, or make results R={RESULT}"


def folder_of(name: str) -> Path:
    """Where the network called `name` lies in the book's checkout; raises SparsityError for an unknown name."""
    if name not in SMALL:
        raise unknown("small network", name, SMALL)
    return project.root() / "results" / results.MODELS / name


def small_path(name: str) -> Path:
    """Folder (config, safetensors, tokenizer) of a small network, each file checked by SHA-256.

    Raises SparsityError for an unknown name or outside a checkout of the book, AssetError where a file is missing,
    damaged or not in the manifest.
    """
    folder = folder_of(name)
    files = results.load(RESULT).data.get(name, {}).get("files", {})
    if not files:
        raise AssetError(f"results/{RESULT}.json does not list {name}. {_FIX}.")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for extra in sorted(found - files.keys()):
        raise AssetError(f"{name} has a file {extra} that its manifest does not list. {_FIX}.")
    for file, expected in files.items():
        if file not in found or sha256_of(folder / file) != expected:
            state = "is damaged" if file in found else "is missing"
            raise AssetError(f"results/models/{name}/{file} {state}: it is not the file that was trained. {_FIX}.")
    return folder
