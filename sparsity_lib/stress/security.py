"""Files and texts that try to run code, to leave their folder, or to put HTML onto a page."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from sparsity_lib import notebooks, project, records, report, results, sealed
from sparsity_lib.errors import SparsityError
from sparsity_lib.plan import FORMAT, Plan
from sparsity_lib.recipe import Recipe
from sparsity_lib.stress import tiny
from sparsity_lib.stress.base import Attempts, NotHereError, trial

#: Texts that would run as code, leave a folder, or become markup, were they taken for more than texts. OWNED: a file to touch.
SHELL = ("$(touch OWNED)", "`touch OWNED`", "; touch OWNED;", "| touch OWNED", "&& touch OWNED", "\ntouch OWNED\n",
         "$(shell touch OWNED)", "'; touch OWNED; '", '"; touch OWNED; "', "${IFS}touch OWNED",
         "__import__('os').system('touch OWNED')",
         "%%bash\ntouch OWNED", "!touch OWNED", "$(eval $(shell touch OWNED))")
_GOALS = (("P", "run"), ("NB", "run"), ("P", "sweep"), ("NB", "refresh"), ("NB", "params"), ("R", "results"))
AWAY = ("../escaped", "../../escaped", "/tmp/escaped", "a/../../escaped", "..\\escaped", "~/escaped", "a//b", ".", "..", "",
        "a\x00b", "C:escaped", "a/b/../../../escaped")
MARKUP = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>",
          "\"><svg onload=alert(1)>", "<iframe src=javascript:alert(1)>", "--><script>alert(1)</script>",
          "'onmouseover=alert(1) x='")


class _Evil:
    """Unpickled, it would touch a file."""

    def __init__(self, owned: Path) -> None:
        self.owned = owned

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.owned),)


@trial("security", "pickles under every name that the library reads: plans, checkpoints, thresholds, models' weights, results",
       "refused, and what the pickle would have run has not run")
def pickles(t: Attempts) -> None:
    from sparsity_lib.assets import load_model
    from sparsity_lib.cwic import load_thresholds
    from sparsity_lib.train.checkpoints import latest

    owned, model = t.folder / "owned", tiny.model()
    os.environ[project.SWITCH] = str(tiny.checkout(t.folder))
    plain, zipped = t.folder / "evil.pkl", t.folder / "evil.pt"
    plain.write_bytes(pickle.dumps(_Evil(owned)))
    torch.save(_Evil(owned), zipped)
    for kind, evil in (("pickle", plain), ("torch.save", zipped)):
        path = t.folder / "x.safetensors"
        shutil.copy(evil, path)
        t.attempt(f"{kind} as a plan", partial(Plan.load, path), right=False)
        t.attempt(f"{kind} as thresholds", partial(load_thresholds, model, path), right=False)
        shutil.copy(evil, t.folder / "results" / "x.json")
        t.attempt(f"{kind} as a result", partial(results.load, "x"), right=False)
        step = t.folder / "run" / "step-00000001"
        step.mkdir(parents=True, exist_ok=True)
        for name in ("state.safetensors", "moments.safetensors", "training.json"):
            shutil.copy(evil, step / name)
        t.attempt(f"{kind} as a checkpoint", partial(latest, step.parent), right=False)
        for name in ("pytorch_model.bin", "model.safetensors", "model.pt", "adapter_model.bin"):
            folder = t.folder / f"model {kind} {name}"
            model.config.save_pretrained(folder)
            shutil.copy(evil, folder / name)
            t.attempt(f"{kind} as {name}", partial(load_model, str(folder)), right=False)
    t.check("a pickle was run", not owned.exists())


@trial("security", "model folders that bring Python code of their own (auto_map, for the configuration, model and tokenizer)",
       "the code is not run: the folder is refused, or loaded as what transformers itself knows")
def remote_code(t: Attempts) -> None:
    from sparsity_lib.assets import load_model, load_tokenizer

    owned = t.folder / "owned"
    for model_type in ("llama", "evil"):
        folder = t.folder / model_type
        tiny.model(layers=1).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
            (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(owned)!r}).touch()\nclass Evil: pass\n")
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = model_type
        config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
        config["trust_remote_code"] = True
        (folder / "config.json").write_text(json.dumps(config))
        words = json.loads((folder / "tokenizer_config.json").read_text())
        words["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
        words["tokenizer_class"] = "Evil" if model_type == "evil" else words["tokenizer_class"]
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
        t.attempt(f"a model of type {model_type}", partial(load_model, str(folder)))
        t.attempt(f"its tokenizer, {model_type}", partial(load_tokenizer, str(folder)))
    t.check("remote code was run", not owned.exists())


@trial("security", "recipes, plans and model configurations that name modules, classes and functions to import or call",
       "refused or read as plain words; nothing is imported")
def named_code(t: Attempts) -> None:
    known = tiny.recipes()[0].to_json()
    path, before = t.folder / "plan.safetensors", set(sys.modules)
    probe = t.folder / "stress_probe.py"
    probe.write_text("raise SystemExit('imported')\n")
    sys.path.insert(0, str(t.folder))
    for name in ("stress_probe", "stress_probe:run", "stress_probe.run", "__main__", "builtins.exec", "os.system"):
        for field in ("select", "score", "transform"):
            bad = json.loads(json.dumps(known))
            bad["rules"][0][field] = {"kind": name}
            t.attempt(f"{field} of kind {name}", partial(Recipe.from_json, bad), right=False)
        for extra in ("module", "import", "__class__", "py/object", "auto_map"):
            t.attempt(f"{extra} = {name}", partial(Recipe.from_json, {**known, extra: name}), right=False)
        sealed.write(path, {}, {"format": FORMAT, "recipe": json.dumps(known), "widths": json.dumps({f"{name}.gate": 1}),
                                "calibration": "{}"})
        t.attempt(f"a plan with a site of {name}", partial(Plan.load, path), right=False)

        from sparsity_lib.hf import SparsityConfig, SparsityQuantizer

        described = SparsityConfig(layers={"kind": name})
        t.attempt(f"layers of kind {name}", lambda d=described: SparsityQuantizer(d).validate_environment(), right=False)
    t.check("something was imported", "stress_probe" not in set(sys.modules) - before)


@trial("security", "names with .., absolute paths, drives and NUL: of results, chapters, records, assets, networks, models",
       "refused; nothing appears outside the folder")
def path_traversal(t: Attempts) -> None:
    from sparsity_lib.assets import asset_path, load_model
    from sparsity_lib.assets.smallnets import small_path
    from sparsity_lib.cwic.shipped import load_shipped

    inner = t.folder / "a" / "b" / "checkout"
    os.environ[project.SWITCH] = str(tiny.checkout(inner))
    os.environ[records.SWITCH] = str(inner / "records")
    (t.folder / "a" / "b" / "escaped.json").write_text('{"name": "x", "data": 1, "manifest": {}}')
    before = {path for path in t.folder.rglob("*") if inner not in path.parents}
    for name in AWAY:
        for what, call in (
            ("load a result", partial(results.load, name)), ("chapter", partial(notebooks.find, name)),
            ("save a result", partial(results.save, name, 1, params={}, seeds=[], command="", seconds=0)),
            ("record", partial(records.Records, name)), ("asset", partial(asset_path, name)),
            ("small network", partial(small_path, name)), ("granular model", partial(load_shipped, name)),
            ("item of a run", partial(results.Checkpoint, name)), ("model", partial(load_model, f"{name}/none")),
        ):
            t.attempt(f"{what} {name!r}", call, right=False)
    t.check("a file outside", {path for path in t.folder.rglob("*") if inner not in path.parents} == before)


@trial("security", "shell, make and notebook syntax as P=, NB= and R= of make, and as values of parameters",
       "taken as text: refused, or used as it is, less white space at its beginning, which make drops; nothing runs it")
def shell_syntax(t: Attempts) -> None:
    makefile = project.root() / "Makefile"
    if not makefile.exists() or shutil.which("make") is None:
        raise NotHereError("there is no make, or no Makefile")
    (t.folder / "venv" / "bin").mkdir(parents=True)
    python = t.folder / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s" "$P$NB$R" > "{t.folder}/seen"\n')
    python.chmod(0o755)
    (t.folder / "venv" / ".installed").write_text("")
    future = 2**32
    os.utime(t.folder / "venv" / ".installed", (future, future))  # newer than the lock: nothing is to be installed
    owned = t.folder / "owned"
    for i, text in enumerate(SHELL):
        text = text.replace("OWNED", str(owned))
        for variable, goal in _GOALS:
            if i % 3 and t.size == "quick":
                continue
            (t.folder / "seen").unlink(missing_ok=True)
            command = ["make", "-s", "-C", str(makefile.parent), goal, f"VENV={t.folder / 'venv'}", f"{variable}={text}"]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "P": "", "NB": "", "R": ""})
            seen = (t.folder / "seen").read_text() if (t.folder / "seen").exists() else None
            t.check(f"{goal} {variable}={text!r} arrived as {seen!r}: {done.stderr[-200:]}",
                    done.returncode == 0 and seen == text.lstrip() and not owned.exists())


class _Markup(HTMLParser):
    """What a browser would take for elements and handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "svg", "iframe") or any(name.startswith("on") for name, _ in attrs):
            self.bad.append(tag)


def _markup(text: str) -> list[str]:
    parser = _Markup()
    parser.feed(text)
    return parser.bad


@trial("security", "HTML and scripts as tokens, as names of models, and in tables of notebooks and pages",
       "shown as the text it is: no element, no handler")
def html_texts(t: Attempts) -> None:
    from sparsity_lib.book import markdown
    from sparsity_lib.figures import token_page

    shown: list[Any] = []
    report._show = lambda data, metadata=None: shown.append(data)
    os.environ[records.SWITCH] = str(t.folder)
    for i, text in enumerate(MARKUP):
        page = token_page.page([{"prompt": 1, "tokens": [[text, 5, text], ["b", 6, "word"]]}], 10, text)
        own = token_page.page([{"prompt": 1, "tokens": [["a", 5, "word"], ["b", 6, "word"]]}], 10, "name")
        t.check(f"token page {text}", _markup(page) == _markup(own))
        report.start(f"stress-{i}")
        report.glue_table(f"tab-{i}", ["model", "number"], [[text, 1]], "Caption.")
        t.check(f"table of a notebook {text}", not _markup(shown[-1]["application/papermill.record/text/markdown"]))
        t.check(f"table of a page {text}", not _markup(markdown.line([markdown.plain(text)])))
        try:
            name = Recipe.from_json({**tiny.recipes()[0].to_json(), "method": text}).method
        except SparsityError:
            name = text
        t.check(f"a method's name that changes, {text}", name == text)
