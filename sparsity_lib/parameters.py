"""A notebook's parameters: what they are, what each may be, and a strict reading of what a user typed.

The cell tagged `parameters` says it all, one annotated assignment a line:

    density: float = 0.5        # (0, 1] share of neurons kept
    method: str = "claws"       # one of: claws, cats, larosa; what to compare
    sequences: int | None = 8   # [1, 512] evaluation sequences, None for all
    sweep: list[float] = [0.5]  # (0, 1] densities of the sweep

The comment opens with what is allowed: an interval, a choice ended by `;`, or nothing (any value of the
type). Of a list, every entry is checked and at least one is needed.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
import tokenize
from dataclasses import dataclass
from typing import Any

from .errors import SparsityError, refuse, shown, unknown

SCALARS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
_NUMBER = r"[-+]?(?:inf|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)"
_INTERVAL = re.compile(rf"^([\[(])\s*({_NUMBER})\s*,\s*({_NUMBER})\s*([\])])\s*(.*)$", re.DOTALL)
_CHOICE = re.compile(r"^one of:\s*([^;]+)(?:;\s*(.*))?$", re.DOTALL)
_ASSIGNMENT = re.compile(r"(?:^|\s+)([A-Za-z_]\w*)\s*=")


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell."""

    name: str
    kind: str
    listed: bool
    optional: bool
    default: Any
    interval: tuple[str, float, float, str] | None
    choices: tuple[str, ...] | None
    help: str

    def allowed(self) -> str:
        """What may be passed, in words."""
        words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}[self.kind]
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        elif self.interval:
            left, low, high, right = self.interval
            words += f" in {left}{low:g}, {high:g}{right}"
        if self.listed:
            words = f"a JSON list, each entry {words}"
        return f"{words}, or none" if self.optional else words

    def check(self, value: Any) -> Any:
        """`value` itself (whole numbers made float where the type is float); raises SparsityError where not allowed."""
        if value is None and self.optional:
            return None
        if not self.listed:
            return self._entry(value, value)
        if not isinstance(value, list) or not value:
            raise refuse(self.name, value, self.allowed())
        return [self._entry(entry, value) for entry in value]

    def _entry(self, value: Any, whole: Any) -> Any:
        wanted = SCALARS[self.kind]
        if wanted is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:  # a whole number beyond any float
                raise refuse(self.name, whole, self.allowed()) from None
        good = type(value) is wanted and value != ""
        if good and wanted is float:
            good = math.isfinite(value)
        if good and self.interval:
            left, low, high, right = self.interval
            good = (value > low or (left == "[" and value == low)) and (
                value < high or (right == "]" and value == high))
        if good and self.choices and str(value) not in self.choices:
            raise unknown(self.name, value, self.choices)
        if not good:
            raise refuse(self.name, whole, self.allowed())
        return value

    def read(self, text: str) -> Any:
        """The value that a user's text stands for, checked."""
        text = text.strip()
        if self.optional and text.lower() in {"none", "null"}:
            return None
        if self.listed:
            try:
                value = json.loads(text, parse_constant=_no_constant)
            except (ValueError, RecursionError):
                raise refuse(self.name, text, self.allowed(), f"{self.name}=[...] in JSON") from None
            return self.check(value)
        return self.check(self._scalar(text))

    def _scalar(self, text: str) -> Any:
        if self.kind == "str":
            quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
            return text[1:-1] if quoted else text
        if self.kind == "bool":
            return {"true": True, "false": False}.get(text.lower(), text)
        pattern = r"[-+]?\d+" if self.kind == "int" else _NUMBER
        if not re.fullmatch(pattern, text):
            return text  # of the wrong type, and so refused with the user's own spelling
        try:
            return SCALARS[self.kind](text)
        except ValueError:  # more digits than Python reads
            return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def parse_cell(source: str, where: str = "the parameters cell") -> dict[str, Parameter]:
    """Read a parameters cell; raises SparsityError where a line does not follow the grammar."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as error:
        raise SparsityError(f"{where}: not Python: {error}.") from None
    comments = {token.start[0]: token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, Parameter] = {}
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            line = ast.get_source_segment(source, node)
            raise SparsityError(f"{where}: {line!r} is not of the form 'name: type = value  # what is allowed'.")
        name = node.target.id
        if name in found:
            raise SparsityError(f"{where}: {name} is set twice.")
        found[name] = _parameter(name, node, comments.get(node.end_lineno or 0, ""), where)
    return found


def _parameter(name: str, node: ast.AnnAssign, comment: str, where: str) -> Parameter:
    annotation = ast.unparse(node.annotation)
    match = re.fullmatch(r"(list\[)?(int|float|str|bool)(\])?( \| None)?", annotation)
    if not match or bool(match[1]) != bool(match[3]):
        raise SparsityError(f"{where}: {name} has the type {annotation!r}; known are int, float, str, bool, "
                            "list[...] of these, each with or without ' | None'.")
    interval, choices, words = None, None, comment
    if ranged := _INTERVAL.match(comment):
        interval, words = (ranged[1], float(ranged[2]), float(ranged[3]), ranged[4]), ranged[5]
        if match[2] not in {"int", "float"}:
            raise SparsityError(f"{where}: {name} is a {match[2]} and cannot have the range {comment!r}.")
    elif choice := _CHOICE.match(comment):
        choices, words = tuple(part.strip() for part in choice[1].split(",")), choice[2] or ""
    elif comment.startswith(("(", "[", "one of")):
        raise SparsityError(f"{where}: {name}: cannot read the constraint in {comment!r}.")
    try:
        default = ast.literal_eval(node.value)
    except ValueError:
        raise SparsityError(f"{where}: the default of {name} is not a plain value.") from None
    parameter = Parameter(name, match[2], bool(match[1]), bool(match[4]), default, interval, choices, words)
    parameter.check(default)
    return parameter


def split_assignments(text: str) -> list[str]:
    """Cut 'a=1 b=[0.5, 0.3] c=some text' into its assignments: each begins at a word followed by '='."""
    starts = [match.start(1) for match in _ASSIGNMENT.finditer(text)]
    if text.strip() and (not starts or text[: starts[0]].strip()):
        raise SparsityError(f"cannot read {shown(text.strip())}: expected name=value pairs, as in 'density=0.3'.")
    ends = [*starts[1:], len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=False)]


def read_assignments(pairs: list[str], known: dict[str, Parameter]) -> dict[str, Any]:
    """Values for the parameters named in `pairs` ('name=value'); raises SparsityError on the first bad one."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals:
            raise SparsityError(f"cannot read {shown(pair)}: expected name=value, as in 'density=0.3'.")
        if name not in known:
            raise unknown("parameter", name, known)
        if name in values:
            raise SparsityError(f"parameter {name} is given twice.")
        values[name] = known[name].read(text)
    return values


def split_values(text: str) -> list[str]:
    """Cut '0.3,0.5' at its commas, but not inside of [...], nor inside of quotes that a value begins with."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1].strip():
            quote = letter
        elif letter in "[]":
            depth += 1 if letter == "[" else -1
        elif letter == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += letter
    return [value.strip() for value in values]


def read_combinations(pairs: list[str], known: dict[str, Parameter]) -> list[dict[str, Any]]:
    """Every combination of the values listed in `pairs` ('name=value,value'), the last name varying fastest, each once.

    Raises SparsityError on the first bad value, before any is used.
    """
    split = [(name, equals, split_values(text)) for name, equals, text in (pair.partition("=") for pair in pairs)]
    read_assignments([f"{name}{equals}{values[0]}" for name, equals, values in split], known)  # refuses what is no pair
    choices = [[read_assignments([f"{name}={value}"], known) for value in values] for name, _, values in split]
    merged = [{name: value for each in chosen for name, value in each.items()} for chosen in itertools.product(*choices)]
    return [each for index, each in enumerate(merged) if each not in merged[:index]]
