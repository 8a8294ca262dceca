"""The function that lm-eval calls for documents: local data, with the columns that the stock tasks expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def load(benchmark: str, config: str | None, splits: list[str], **metadata: object) -> dict[str, Dataset]:
    """The local splits of a benchmark, by name. lm-eval passes the task's metadata along, which is not needed here."""
    from sparsity_lib.assets import load_benchmark

    return {split: _stock_columns(benchmark, load_benchmark(benchmark, config, split)) for split in splits}


def _stock_columns(benchmark: str, documents: Dataset) -> Dataset:
    """Name the answers as lm-eval's task does where the local copy of a set names them otherwise."""
    from datasets import Dataset

    if benchmark == "trivia_qa":  # its empty columns for contexts take most of the time
        documents = documents.select_columns(["question", "question_id", "answer"])
    # A copy in memory: what lm-eval derives from documents on disk would be written beside them, into our cache.
    documents = Dataset.from_dict(documents.to_dict(), features=documents.features)
    if benchmark == "boolq" and "label" not in documents.column_names:
        return documents.add_column("label", [int(answer) for answer in documents["answer"]])
    return documents
