"""The compiled operators, called with arguments that do not fit: nothing may crash, and what is computed must be right."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparsity_lib import ops
from sparsity_lib.ops import library, reference
from sparsity_lib.stress.base import Attempts, trial

#: Loose enough for bfloat16 outputs, far below what a wrong weight would make of them.
CLOSE = {"rtol": 2e-2, "atol": 2e-2}
_BAD: tuple[Any, ...] = (
    None, -1, 0, 1, 2**40, True, 0.5, float("nan"), float("inf"), -float("inf"), "0.5", [0.5], object(), torch.ones(3),
    torch.ones(()), torch.ones(2, 2, dtype=torch.float64), torch.empty(0), torch.ones(5, device="meta"),
    torch.ones(4).to_sparse(), torch.ones(3, dtype=torch.int32), torch.ones(4, dtype=torch.complex64))


def _sizes(t: Attempts) -> tuple[int, int, int]:
    return t.random.choice([0, 1, 2, 5, 17]), t.random.choice([1, 2, 7, 33, 64, 130]), t.random.choice([1, 3, 16, 65, 128])


def _vectors(t: Attempts, *shape: int) -> Tensor:
    """Numbers, now and then spoilt by what is not finite or tiny, in a dtype and a memory layout of chance."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(t.random.randrange(2**31)))
    if x.numel() and t.random.random() < 0.2:
        x.view(-1)[t.random.randrange(x.numel())] = t.random.choice([float("nan"), float("inf"), 1e38, 1e-42, 0.0])
    x = x.to(t.random.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    kind = t.random.randrange(5)
    if kind == 0 and x.dim() == 2:
        return x.T.contiguous().T
    if kind == 1 and x.dim() == 2:
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    if kind == 2:
        return x[None]
    return x


def _spoil(t: Attempts, arguments: dict[str, Any]) -> dict[str, Any]:
    """One argument, or none, replaced by what does not belong there."""
    if t.random.random() < 0.5:
        return arguments
    name = t.random.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, ops.Packed) and t.random.random() < 0.5:
        field = t.random.choice(["rows", "cols", "padded", "group", "stripe", "format", "skip", "scales", "data"])
        other = t.random.choice([0, 1, 3, 10**9, -5, "int4", "float32", "inputs", "outputs", None, torch.ones(2, 64)])
        return {**arguments, name: (value, field, other)}
    if isinstance(value, Tensor) and value.numel() and t.random.random() < 0.5:
        changed = t.random.choice([
            value[..., :-1], value.double(), value.new_empty(0), value.flatten(), value.expand(2, *value.shape), value.to("meta"),
            value.clone().requires_grad_(True), -value.abs() - 1])
        return {**arguments, name: changed}
    return {**arguments, name: t.random.choice(_BAD)}


def _made(arguments: dict[str, Any]) -> dict[str, Any]:
    """With spoilt weights, which come to be here or are refused."""
    made = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            weight, field, other = value
            value = dataclasses.replace(weight, **{field: other})
        made[name] = value
    return made


def _rule(t: Attempts, inputs: int) -> dict[str, Any]:
    return t.random.choice([{"k": t.random.randint(0, inputs)}, {"threshold": t.random.choice([0.5, 0.0, -1.0, 1e30])},
                            {"threshold": torch.rand(inputs)}])


def _arguments(t: Attempts, name: str, how: str) -> dict[str, Any]:
    tokens, inputs, outputs = _sizes(t)
    pack = {"format": how, "group": t.random.choice(ops.packed.GROUPS)}
    x, random = _vectors(t, tokens, inputs), torch.randn
    optional = {"bias": random(outputs)} if t.random.random() < 0.5 else {}
    if name == "linear":
        return {"x": x, "weight": ops.pack(random(outputs, inputs), "outputs", **pack), **optional}
    if name == "nm_select":
        m = t.random.choice([1, 2, 4, 7, 64, 65])
        return {"x": x, "n": t.random.randint(1, m), "m": m, "pad": t.random.random() < 0.7, "bits": t.random.random() < 0.5,
                "repair": t.random.choice([None, "variance"]), "shift": t.random.choice([None, torch.randn(inputs)])}
    if name == "input_sparse":
        if t.random.random() < 0.3:
            stripe = t.random.randint(1, outputs)
            rule = {"threshold": torch.rand(-(-outputs // stripe), inputs)}
            return {"x": x, "weight": ops.pack(random(outputs, inputs), "inputs", stripe=stripe, **pack), **rule, **optional}
        moved = t.random.choice([{}, {"shift": random(inputs)}, {"scale": torch.rand(inputs)}])
        share = {"share": t.random.choice(["own", "union"])}
        weight = ops.pack(random(outputs, inputs), "inputs", **pack)
        return {"x": x, "weight": weight, **_rule(t, inputs), **moved, **share, **optional}
    gate, up = (ops.pack(random(outputs, inputs), "outputs", **pack) for _ in range(2))
    parts = {"up": up, "down": ops.pack(random(inputs, outputs), "inputs", **pack), **_rule(t, outputs)}
    if t.random.random() < 0.5:
        parts["saliency"] = torch.rand(outputs)
    if name == "gated":
        return {"x": x, "g": _vectors(t, tokens, outputs).view(*x.shape[:-1], outputs), **parts}
    return {"x": x, "gate": gate, **parts, "activation": t.random.choice([*ops.ACTIVATIONS, "silly"])}


def _like_reference(name: str, arguments: dict[str, Any], found: Any) -> bool:
    """Whether a result has the right shape and, where the rule is one that rounding cannot turn, the reference's numbers."""
    x = arguments["x"]
    if name == "nm_select":
        y = found[0] if isinstance(found, tuple) else found
        return y.shape == x.shape and y.dtype == x.dtype
    if found.dtype != x.dtype or found.shape[:-1] != x.shape[:-1]:
        return False
    if name != "linear" or x.numel() and not x.float().abs().max() < 1e30:  # NaN too
        return True  # masks hang on how sums round: tests/test_ops.py compares those where there is a gap
    expected = reference.linear(x.reshape(-1, x.shape[-1]), arguments["weight"], arguments.get("bias")).view(found.shape)
    return torch.allclose(found.float(), expected.float(), **CLOSE)


@trial("inputs", "the compiled operators with wrong shapes, dtypes, strides and devices, weights whose fields lie, ranks and "
                 "thresholds out of range, NaN and infinity",
       "never a crash: a clear error, or a result of the right shape (of dense products, also the reference's numbers)")
def operator_arguments(t: Attempts) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = ("input_sparse", "nm_select", "linear", "glu", "gated")
    t.facts["compiled"] = library.path() is not None
    for i in t.rounds(400, 12000):
        name, how = t.random.choice(names), t.random.choice(list(ops.FORMATS))
        arguments = _spoil(t, _arguments(t, name, how))
        t.attempt(f"{name} {i}: { {n: _short(a) for n, a in arguments.items()} }",
                  lambda n=name, a=arguments: getattr(ops, n)(**_made(a)),
                  lambda found, n=name, a=arguments: _like_reference(n, _made(a), found))


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{value.device.type[0]}"
    if isinstance(value, tuple):
        return f"weight with {value[1]} = {_short(value[2])}"
    return value.format if isinstance(value, ops.Packed) else repr(value)[:30]
