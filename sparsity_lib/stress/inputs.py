"""Bad inputs: files and texts that somebody else wrote, harmed at random or on purpose."""

from __future__ import annotations

import json
import os
import zipfile
from functools import partial

from sparsity_lib import parameters, project, records, results, sealed
from sparsity_lib.assets import build, fetch, registry
from sparsity_lib.cwic.config import CWICConfig
from sparsity_lib.errors import AssetError
from sparsity_lib.plan import FORMAT, Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.sites import find_sites
from sparsity_lib.stress import harm, tiny
from sparsity_lib.stress.base import Attempts, trial
from sparsity_lib.train import TrainRecipe

CLEAR = "a clear error, or a value that comes back equal from its own JSON"


@trial("inputs", "recipes as JSON, of every method, with values replaced, removed, nested or made hostile", CLEAR)
def recipe_json(t: Attempts) -> None:
    known = [recipe.to_json() for recipe in tiny.recipes()]
    for i in t.rounds(300, 6000):
        text = harm.text(t.random.choice(known), t.random)
        t.attempt(f"recipe {i}: {text[:300]}", partial(Recipe.from_json, text),
                  lambda found: Recipe.from_json(found.dumps()) == found)


@trial("inputs", "the same recipes as Python objects, which can hold what JSON cannot", CLEAR)
def recipe_objects(t: Attempts) -> None:
    known = [recipe.to_json() for recipe in tiny.recipes()]
    for i in t.rounds(200, 4000):
        value = harm.data(t.random.choice(known), t.random)
        t.attempt(f"recipe object {i}", partial(Recipe.from_json, value), lambda found: Recipe.from_json(found.dumps()) == found)


@trial("inputs", "plan files whose metadata were harmed before they were sealed, so that their checksum is right",
       "a clear error when they are read or checked against the model, or a plan that is well formed")
def plan_metadata(t: Attempts) -> None:
    from sparsity_lib.fit import fit

    model = tiny.model()
    sites, path = find_sites(model), t.folder / "plan.safetensors"
    plans = [fit(recipe, model, ids=tiny.tokens()) for recipe in tiny.recipes()[:3]]

    def load() -> None:
        Plan.load(path).check_fits(sites)

    for i in t.rounds(100, 2000):
        plan = t.random.choice(plans)
        meta = {"format": FORMAT, "recipe": plan.recipe.dumps(), "widths": json.dumps(dict(plan.widths)),
                "calibration": json.dumps(dict(plan.calibration))}
        name = t.random.choice(["recipe", "recipe", "widths", "calibration"])
        meta[name] = harm.text(json.loads(meta[name]), t.random).encode("utf-8", "replace").decode()
        sealed.write(path, plan.tensors, meta)
        t.attempt(f"plan {i}: {name} = {meta[name][:300]}", load)


@trial("inputs", "training and CWIC recipes with hostile values", CLEAR)
def training_recipes(t: Attempts) -> None:
    recipe, config = TrainRecipe(steps=4, batch=2, learning_rate=0.1).to_json(), CWICConfig().to_json()
    for i in t.rounds(200, 4000):
        value = harm.data(recipe, t.random)
        t.attempt(f"training recipe {i}: {value!r:.300}",
                  lambda v=value: TrainRecipe(**v) if all(map(str.isidentifier, v)) and v.keys() <= recipe.keys() else None,
                  refusal=(ValueError, TypeError))  # TypeError: a field that is left out is Python's own error
        value = harm.data(config, t.random)
        t.attempt(f"CWIC config {i}: {value!r:.300}", partial(CWICConfig.from_json, value),
                  lambda found: CWICConfig.from_json(found.to_json()) == found)


@trial("inputs", "results, records of chapters and records of assets, harmed as bytes and as data",
       "a clear error, or plain data of the expected form")
def json_files(t: Attempts) -> None:
    os.environ[project.SWITCH] = str(tiny.checkout(t.folder))
    path = results.save("demo", {"x": [1.5, 2.5]}, params={"a": 1}, seeds=[0], command="make", seconds=1.0)
    record = t.folder / "record.json"
    record.write_text(json.dumps({"name": "demo", "entries": {"ppl": {"value": 1.5, "rtol": 0.01, "atol": 0.0}}}))
    whole, entries = path.read_bytes(), record.read_bytes()
    asset = registry.Asset("tiny", "data", (registry.Wheel("p", "1", "0" * 64, 1, "none"),), ("*",), "", 1, "tiny")
    made = {"asset": "tiny", "converter": build.CONVERTER, "wheels": [{"sha256": "0" * 64}],
            "files": {"a.txt": {"bytes": 1, "sha256": "1" * 64, "xxh3": "2" * 32}}}
    registry.ASSETS["tiny"] = asset
    os.environ["SPARSITY_CACHE"] = str(t.folder / "cache")
    folder = build.folder_of(asset)
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("not what the record says")
    for i in t.rounds(100, 2500):
        broken = harm.bytes_(whole, t.random) if i % 2 else harm.text(json.loads(whole), t.random).encode("utf-8", "replace")
        path.write_bytes(broken)
        t.attempt(f"result {i}: {broken[:300]!r}", lambda: results.load("demo"), lambda found: isinstance(found.manifest, dict))
        broken = harm.bytes_(entries, t.random) if i % 2 else harm.text(json.loads(entries), t.random).encode("utf-8", "replace")
        record.write_bytes(broken)
        t.attempt(f"record {i}: {broken[:300]!r}", lambda: records.read(record), lambda found: isinstance(found, dict))
        broken = harm.text(made, t.random).encode("utf-8", "replace")
        (folder / build.RECORD).write_bytes(broken)
        t.attempt(f"asset record {i}: {broken[:300]!r}", partial(build.verify_asset, "tiny"), right=False)


@trial("inputs", "wheels whose bytes were harmed, opened as archives behind the checksum's back",
       "a clear error, or members that lie inside the target folder")
def archives(t: Attempts) -> None:
    path = t.folder / "tiny-1.whl"
    content = {f"pkg/{i}.txt": f"text {i} ".encode() * 50 for i in range(4)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, inside in content.items():
            archive.writestr(name, inside)
    whole = path.read_bytes()
    target = t.folder / "target"

    def extract() -> bool:
        return all(target in file.parents for file in fetch.extract(path, ("pkg/*",), "pkg/", target))

    for i in t.rounds(150, 4000):
        path.write_bytes(harm.bytes_(whole, t.random))
        t.attempt(f"archive {i}", extract, bool, refusal=AssetError)
    t.check("a file outside of the target", {p.name for p in t.folder.iterdir()} <= {"tiny-1.whl", "target"})


_CELL = """\
model: str = "smollm2"  # any model
density: float = 0.5  # (0, 1] share
method: str = "claws"  # one of: claws, cats
sweep: list[float] = [0.7]  # (0, 1] densities
sequences: int | None = 8  # [1, 512] sequences
quick: bool = True
"""


@trial("inputs", 'texts as P="..." of make run and make sweep: random letters, quotes, brackets, shell characters, long numbers',
       "a clear error, or a value of the right type inside its range")
def parameter_texts(t: Attempts) -> None:
    cell = _CELL
    known = parameters.parse_cell(cell)
    letters = "aexs01.-+_ =,[]{}\"'`$()|;&<>\\/\n\t\x00é٣½∞"

    def reads(read) -> bool:
        many = read if isinstance(read, list) else [read]
        return all(known[name].check(value) == value for each in many for name, value in each.items())

    for i in t.rounds(500, 20000):
        name = t.random.choice([*known, "densty", "__class__", ""])
        value = t.random.choice([
            "".join(t.random.choices(letters, k=t.random.randint(0, 30))), str(t.random.choice(harm.HOSTILE))[:200],
            json.dumps(harm.data([0.5, 0.3], t.random))[:3000], "9" * t.random.choice([1, 400, 5000]), "[" * 3000])
        text = f"{name}={value}" if t.random.random() < 0.9 else value
        t.attempt(f"parameter {i}: {text[:300]!r}",
                  lambda text=text: parameters.read_assignments(parameters.split_assignments(text), known), reads)
        if i % 2:
            t.attempt(f"parameters of a sweep {i}: {text[:300]!r}",
                      lambda text=text: parameters.read_combinations(parameters.split_assignments(text), known), reads)
        if i % 4 == 0:
            broken = harm.bytes_(cell.encode(), t.random).decode("utf-8", "replace")
            t.attempt(f"parameters cell {i}: {broken[:300]!r}", partial(parameters.parse_cell, broken))


@trial("inputs", "model folders whose configuration or weights were harmed, the sparse recipe in config.json included",
       "a clear error, or a model")
def model_folders(t: Attempts) -> None:
    from sparsity_lib.assets import load_model
    from sparsity_lib.fit import fit
    from sparsity_lib.install import install

    model = tiny.model(layers=1)
    install(model, fit(tiny.recipes()[1], model, ids=tiny.tokens()))
    folder = t.folder / "model"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    expected = model(tiny.tokens()).logits
    t.attempt("the whole folder", lambda: load_model(str(folder))[0](tiny.tokens()).logits, expected.equal)
    config, weights = ((folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
    for i in t.rounds(25, 400):
        if i % 3 == 0:
            broken = harm.bytes_(weights, t.random)
            (folder / "config.json").write_bytes(config)
            (folder / "model.safetensors").write_bytes(broken)
        else:
            plain = json.loads(config)
            if i % 3 == 1:
                plain["quantization_config"] = harm.data(plain["quantization_config"], t.random)
            else:
                plain = harm.data(plain, t.random)
            (folder / "config.json").write_text(json.dumps(plain))
            (folder / "model.safetensors").write_bytes(weights)
        t.attempt(f"model folder {i}", partial(load_model, str(folder)))


@trial("inputs", "GGUF files that were harmed before they are joined and read (the library has no parser of its own: "
                 "transformers reads a file only after its SHA-256 was found right)",
       "refused by checksum, before anything is parsed")
def gguf_files(t: Attempts) -> None:
    import hashlib

    from sparsity_lib.assets.convert import join_gguf

    whole = b"GGUF" + (3).to_bytes(4, "little") + t.random.randbytes(3000)
    asset = registry.Asset("tiny", "gguf", (), ("*",), "", 1, "tiny", gguf_sha256=hashlib.sha256(whole).hexdigest())
    parts = [t.folder / "a", t.folder / "b"]
    for i in t.rounds(100, 2000):
        broken = harm.bytes_(whole, t.random)
        for part, content in zip(parts, (broken[:1000], broken[1000:]), strict=True):
            part.write_bytes(content)
        if broken != whole:
            t.attempt(f"GGUF {i}", partial(join_gguf, parts, asset, t.folder / "joined"), right=False, refusal=AssetError)
