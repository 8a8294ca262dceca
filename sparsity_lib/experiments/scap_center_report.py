"""Rows, curves and verdicts on mode-centering, from the kept runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bootstrap import Interval, median_interval, ratio_interval
from sparsity_lib.experiments.claws_report import cell, short
from sparsity_lib.experiments.scap_coverage import relative_change
from sparsity_lib.experiments.scap_report import in_points
from sparsity_lib.pareto import sparsity_gain
from sparsity_lib.report import Number
from sparsity_lib.sites import DOWN_IN
from sparsity_lib.verdicts import Verdict, effect, kept

#: Target at which the uncentred network sets the quality that the others are asked to keep.
AT = 0.3
#: Allowed relative loss of figure 7.
MARGIN = 0.01


def sparsities(found: Mapping[str, Any]) -> np.ndarray:
    """Sparsity met at the down projection's inputs, [points]."""
    return np.array([p["shares"]["sites"][DOWN_IN] for p in found["points"]])


def losses(found: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses [points, units] and weights [units]."""
    return np.array([p["loss"] for p in found["points"]], dtype=float), np.array(found["dense"]["weights"], dtype=float)


def curves(ablation: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, Interval]]]]:
    """network -> centre -> [(down sparsity, mean loss)]: what `figures.scap.centring` draws."""
    found: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for network, centers in ablation.items():
        for center, each in centers.items():
            loss, weights = losses(each)
            found.setdefault(network, {})[center] = [
                (float(s), ratio_interval(values, weights)) for s, values in zip(sparsities(each), loss, strict=True)]
    return found


def gain(centers: Mapping[str, Any], center: str = "mode", at: float = AT) -> Interval:
    """How much sparser the down projection's inputs are with `center` than without, at the loss without it at target `at`."""
    base = centers["none"]
    place = next(i for i, p in enumerate(base["points"]) if p["down"] == at)
    own, weights = losses(centers[center])
    return sparsity_gain(sparsities(centers[center]), own, weights, losses(base)[0][place], float(sparsities(base)[place]))


def within(each: Mapping[str, Any], margin: float = MARGIN) -> float:
    """The largest sparsity met whose task score, on all units, is within `margin` of the dense one, and all milder ones too."""
    reached = 0.0
    for sparsity, point in sorted(zip(sparsities(each), each["points"], strict=True), key=lambda pair: pair[0]):
        if task_change(each, point).value < -margin:
            break
        reached = float(sparsity)
    return reached


def task_change(each: Mapping[str, Any], point: Mapping[str, Any]) -> Interval:
    """Change of the task's score relative to dense, paired over all units."""
    return relative_change({"scale": each["scale"], **point}, each["dense"], slice(None))


def ablation_rows(ablation: Mapping[str, Any], at: float = 0.5) -> list[list[Any]]:
    """Network, centre; at target `at` the sparsity met (%), loss, task change (%); the sparsity within 1%; the gain (points)."""
    rows = []
    for network, centers in ablation.items():
        for center, each in centers.items():
            place = next(i for i, p in enumerate(each["points"]) if p["down"] == at)
            loss, weights = losses(each)
            change = task_change(each, each["points"][place])
            rows.append([
                short(network), center, Number(100 * sparsities(each)[place], ".1f"),
                cell(ratio_interval(loss[place], weights), ".4f"), in_points(change), Number(100 * within(each), ".0f", atol=10),
                None if center == "none" else in_points(gain(centers, center)),
            ])
    return rows


def distribution_rows(distributions: Mapping[str, Any]) -> list[list[Any]]:
    """Network and place; medians over layers: mean, median, mode, deviation, |mode| over deviation, share within 0.05 of zero
    and of the mode (%)."""
    rows = []
    for network, places in distributions.items():
        for place, found in places.items():
            names = ("mean", "median", "mode", "std", "near_zero", "near_mode")
            middle = {name: float(np.median(found[name])) for name in names}
            rows.append([short(network), place, *(Number(middle[n], "z.3f", atol=0.005) for n in names[:4]),
                         Number(float(np.median(offset(found))), ".2f", atol=0.02),
                         Number(100 * middle["near_zero"], ".1f"), Number(100 * middle["near_mode"], ".1f")])
    return rows


def offset(found: Mapping[str, Any]) -> np.ndarray:
    """|mode| in standard deviations, [layers]."""
    return np.abs(np.array(found["mode"])) / np.maximum(np.array(found["std"]), 1e-12)


def verdict_gain(ablation: Mapping[str, Any], network: str) -> Verdict:
    """S3: points of down sparsity that centring on the mode adds at equal quality."""
    found = gain(ablation[network])
    return effect(
        f"S3, {short(network)}", "mode-centering lifts the sparsity of down's inputs at -1% from 12.7 to 57.4% (MPT) and from "
        "30.5 to 50.3% (Falcon)",
        f"points of down sparsity at the loss that the uncentred network has at {AT:.0%}; the smaller of both published gains",
        number=100 * found.value, low=100 * found.low, high=100 * found.high, published=19.8)


def verdict_centred(distributions: Mapping[str, Any], gated: Sequence[str]) -> Verdict:
    """S10: the peak of what enters the down projection behind a gate, in standard deviations from zero."""
    found = median_interval([x for name in gated for x in offset(distributions[name][DOWN_IN])])
    return kept(
        "S10", "activations behind gated FFNs are centred already",
        "distance of the peak from zero in standard deviations, median over layers, negative; 0.1 is allowed",
        number=-found.value, low=-found.high, high=-found.low, margin=0.1)
