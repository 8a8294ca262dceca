"""The same computation again: in a fresh process, with other threads, with other instruction sets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np

from sparsity_lib.ops import library
from sparsity_lib.stress.base import Attempts, trial

#: Largest difference that another number of threads or instruction set may make, by size of the largest number of its kind.
BOUND = 1e-5
#: Instruction sets of torch's own products.
_TORCH_SETS = ("default", "avx2", "avx512")


def computed(folder: str) -> dict[str, Any]:
    """A fit, an evaluation, products and a figure: checksums of the files, and numbers."""
    import hashlib

    import torch

    from sparsity_lib import ops, style
    from sparsity_lib.evaluate.quality import evaluate
    from sparsity_lib.fit import fit
    from sparsity_lib.install import install, uninstall
    from sparsity_lib.methods import METHODS
    from sparsity_lib.stress import tiny

    model_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    model = tiny.model()
    torch.set_num_threads(model_threads)
    files, numbers = {}, {}
    for name in ("cats", "claws", "larosa", "scap", "wina"):
        plan = fit(METHODS[name](0.5), model, ids=tiny.tokens(16, 32))
        path = plan.save(os.path.join(folder, f"{name}.safetensors"))
        files[f"plan of {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        numbers[f"plan of {name}"] = [float(v) for tensor in plan.tensors.values() for v in tensor.abs().double().flatten()[:200]]
        install(model, plan)
        with torch.no_grad():
            logits = model(tiny.tokens(4, 32, seed=1)).logits
        numbers[f"logits of {name}"] = logits.double().flatten()[:2000].tolist()
        files[f"logits of {name}"] = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        uninstall(model)
        found = evaluate(model, {name: plan}, tiny.tokens(4, 32, seed=1))[name]
        numbers[f"evaluation of {name}"] = [*found.nll, *found.kl]
        files[f"evaluation of {name}"] = hashlib.sha256(json.dumps(found.to_json()).encode()).hexdigest()
    draw = np.random.default_rng(0)  # torch's normal numbers differ in last bits by instruction set, and rounded weights by steps
    weight, x = (torch.from_numpy(draw.standard_normal(shape, np.float32)) for shape in ((700, 300), (5, 300)))
    for how in ("float32", "bfloat16", "int8", "int4"):
        y = ops.input_sparse(x, ops.pack(weight, "inputs", how), k=100)
        numbers[f"operator, {how}"] = y.double().flatten().tolist()
        files[f"operator, {how}"] = hashlib.sha256(y.numpy().tobytes()).hexdigest()
    wide, rows = (torch.from_numpy(draw.standard_normal(shape, np.float32)) for shape in ((1536, 2048), (128, 2048)))
    for how, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):  # large enough for torch to share among threads
        y = torch.nn.functional.linear(rows.to(dtype), wide.to(dtype)).float()
        numbers[f"torch's product, {how}"] = y.flatten()[:4000].tolist()
        files[f"torch's product, {how}"] = hashlib.sha256(y.numpy().tobytes()).hexdigest()
    files.update(_figures(folder, style))
    return {"files": files, "numbers": numbers}


def _figures(folder: str, style: Any) -> dict[str, str]:
    import hashlib

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from sparsity_lib.figures import claws, foundations

    found = {}
    made = {
        "blind spot": claws.blind_spot({"claws": [0.4, 0.5, 0.6], "cats": [0.3, 0.2, 0.1]}, 0.1),
        "weights read": foundations.weights_read({"smollm2-135m-instruct": {"attention": 30, "ffn": 40, "head": 20, "rest": 1}}),
        "lines": _lines(style),
    }
    for name, figure in made.items():
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = os.path.join(folder, f"{name}.{kind}")
            figure.savefig(path, metadata=metadata)
            with open(path, "rb") as file:
                found[f"figure {name}, {kind}"] = hashlib.file_digest(file, "sha256").hexdigest()
        plt.close(figure)
    return found


def _lines(style: Any) -> Any:
    figure, axes = style.figure(1, 2)
    for method in ("claws", "cats"):
        style.line(axes[0], method, [0, 1, 2], [1, 2, 4], low=[0, 1, 2], high=[2, 3, 5])
    axes[0].legend()
    return figure


def _fresh(t: Attempts, name: str, **environment: str) -> dict[str, Any] | None:
    """`computed` in a new process; None where it cannot run so."""
    folder = t.folder / name
    folder.mkdir()
    code = "import json, sys; from sparsity_lib.stress import bits; print(json.dumps(bits.computed(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment})
    if done.returncode:
        # the operators say what a processor lacks; torch runs into it
        torch_lacks = "ATEN_CPU_CAPABILITY" in environment and done.returncode == -signal.SIGILL
        if not torch_lacks and "lacks it" not in done.stderr:
            t.lose(f"{name}: exit status {done.returncode} {done.stderr[-500:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """By kind of number: the largest difference, in units of the largest number."""
    found: dict[str, float] = {}
    for name, values in one.items():
        a, b = np.asarray(values), np.asarray(other[name])
        kind = name.partition(" of ")[0].partition(",")[0]
        found[kind] = max(found.get(kind, 0.0), float(np.abs(a - b).max() / np.abs(a).max()))
    return found


@trial("bits", "plans, evaluations, products and figures (PNG and SVG), computed twice in fresh processes, with other hash seeds",
       "the same files, byte for byte")
def same_bytes(t: Attempts) -> None:
    first = _fresh(t, "0", PYTHONHASHSEED="1")
    for i in t.rounds(1, 2):
        again = _fresh(t, f"{i + 1}", PYTHONHASHSEED=str(2 + i))
        for name, digest in (first or {"files": {}})["files"].items():
            t.check(f"{name} differs", again is not None and again["files"][name] == digest)


@trial("bits", "the same with two threads, with each instruction set of the operators, and with each of torch's",
       f"differences of at most {BOUND:g} of the largest number of their kind; of the operators with more threads: none")
def other_arithmetic(t: Attempts) -> None:
    base = _fresh(t, "base")
    if base is None:
        return
    cases = {"two threads": {"OMP_NUM_THREADS": "2"}}
    cases.update({f"operators with {isa}": {library.SWITCH: isa} for isa in (*library.ISAS, "off")})
    cases.update({f"torch with {name}": {"ATEN_CPU_CAPABILITY": name} for name in _TORCH_SETS})
    if t.size == "quick":
        cases = {name: cases[name] for name in ("two threads", "operators with baseline")}
    for name, environment in cases.items():
        found = _fresh(t, name, **environment)
        if found is None:
            t.facts[name] = {}  # a row without numbers: this processor lacks it
            continue
        differences = _difference(base["numbers"], found["numbers"])
        t.facts[name] = differences
        for kind, difference in differences.items():
            t.check(f"{name}: {kind} differs by {difference:.2g}", difference <= BOUND)
        if name == "two threads":
            for file, digest in found["files"].items():
                if file.startswith("operator"):
                    t.check(f"{file} differs with {name}", digest == base["files"][file])
