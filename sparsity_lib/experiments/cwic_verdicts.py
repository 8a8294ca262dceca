"""Verdicts of the CWIC chapter. Where a paper gives scores and the small networks have losses, the size was set here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsity_lib.evaluate.bench_result import BenchmarkResult, Interval, paired_difference
from sparsity_lib.evaluate.bootstrap import ratio_interval, resample
from sparsity_lib.evaluate.quality import difference
from sparsity_lib.experiments.cwic_report import (
    ablation,
    at_ratio,
    best_teal,
    dense_of,
    headed_teal,
    near,
    of_run,
    pooled,
    pooled_at,
    quality,
    runs_of,
    times_kl,
    ways,
)
from sparsity_lib.experiments.cwic_time_report import bench_verdicts
from sparsity_lib.verdicts import Verdict, effect, kept, not_testable

Data = Mapping[str, Any]
#: How the id of a verdict ends whose rival is TEAL with the head as a further site.
WITH_HEAD = "TEAL with the head"
#: Share of each of the six tasks that guessing gets right, by its number of answers.
GUESSED = {"winogrande": 1 / 2, "arc_challenge": 1 / 4, "hellaswag": 1 / 4, "arc_easy": 1 / 4, "openbookqa": 1 / 4, "piqa": 1 / 2}
CHANCE = sum(GUESSED.values()) / len(GUESSED)
AHEAD = "CWIC is ahead of TEAL at a third of the parameters (by 15 points, 1B)"


def verdict_teal(data: Data, model: str, way: str, ratio: float = 3.0, *, head: bool = False) -> Verdict:
    """A1: ahead of TEAL at equal ratio; with `head`, of TEAL with the head as a further site, which its paper does not have."""
    words, claim = AHEAD, f"A1, {model}, {way}"
    ratio = near(ways(data)[way], ratio)
    own = pooled_at(ways(data)[way], data["teal"]["uniform"], ratio)
    teal, name = (headed_teal(data, ratio), "TEAL, head included,") if head else (best_teal(data, ratio), "the better TEAL")
    claim = f"{claim}, {WITH_HEAD}" if head else claim
    if own is None or teal is None:
        missing = "the run" if own is None else "TEAL"
        return not_testable(claim, words, f"{missing} does not reach {ratio:g}x", "make results R=cwic_small")
    found = difference(teal, own, "nll")
    return effect(
        claim, words, f"nats per token that {name} loses beyond {way} at {ratio:.3g}x; 0.1 was set here",
        number=found.value, low=found.low, high=found.high, published=0.1)


def score_of(data: Data, point: str, group: str) -> float:
    """Mean of the group's tasks at one point of `cwic_tasks`, as a share of one."""
    return BenchmarkResult.from_dict(data[point]["result"]).score(group).mean


def paired(data: Data, group: str, ratio: str) -> Interval:
    """Mean of the group's tasks by learned thresholds less TEAL's, asked for the same ratio."""
    return paired_difference(
        *(BenchmarkResult.from_dict(data[name]["result"]) for name in (f"smollm2-cwic-{ratio}", f"teal {ratio}")), group)


def verdict_tasks(data: Data, group: str, ratio: str = "3x", points: float = 15.0) -> Verdict:
    """A1 by the paper's measure; not testable where the dense model is less than that ahead of guessing."""
    found, room = paired(data, group, ratio), 100 * (score_of(data, "dense", group) - CHANCE)
    if room < points:
        return not_testable(
            "A1, SmolLM2, tasks", AHEAD, f"the dense model is {room:.0f} points ahead of guessing, so that nothing can be "
            f"{points:g} points behind it; learned thresholds less TEAL's at {ratio}: {100 * found.mean:+.1f} points "
            f"[{100 * found.lo:+.1f}, {100 * found.hi:+.1f}]", "make results R=cwic_tasks")
    return effect(
        "A1, SmolLM2, tasks", AHEAD, f"mean of six tasks in points, learned thresholds less TEAL's at {ratio}, weights untouched",
        number=100 * found.mean, low=100 * found.lo, high=100 * found.hi, published=points)


def verdict_graceful(data: Data, model: str, way: str, low: float = 2.0, high: float = 3.5) -> Verdict:
    """A4: what is lost grows slowly, TEAL's does not."""
    words, claim = "CWIC declines gracefully where TEAL collapses beyond a third", f"A4, {model}"
    runs, dense = ways(data)[way], dense_of(data)
    own = [pooled_at(runs, data["teal"]["uniform"], r) for r in (low, high)]
    teal = [best_teal(data, r) for r in (low, high)]
    if None in own or None in teal:
        return not_testable(claim, words, f"a way does not reach {high:g}x", "make results R=cwic_small")
    steps = [np.subtract(b.nll, a.nll) for a, b in (own, teal)]
    found = ratio_interval(steps[1] - 2 * steps[0], dense.tokens)
    return effect(
        claim, words, f"nats that TEAL loses from {low:g}x to {high:g}x less twice what {way} loses: above zero, at least "
        "twice as many; 0.1 was set here", number=found.value, low=found.low, high=found.high, published=0.1)


def verdict_twin(data: Data, name: str, published: str) -> Verdict:
    """A3 and F2 at the small network's size."""
    twin = data["twins"][name]
    own = pooled_at(runs_of(data, "active"), data["teal"]["uniform"], twin["ratio"])
    found = difference(quality(twin), own, "nll")
    return effect(
        f"A3, {name}", published,
        f"nats per token of a dense network with {twin['weights']:,} weights, trained on as many tokens as the teacher, less "
        "CWIC's at as many active ones; 0.02 was set here",
        number=found.value, low=found.low, high=found.high, published=0.02)


def verdict_more(data: Data, name: str, words: str, claim: str, *, size: float = 1.1, ratio: float | None = 3.0) -> Verdict:
    """An ablation that should raise KL: at one ratio, or at the end of training."""
    pair = ablation(data, name, ratio)
    where = "at the end of training" if ratio is None else f"at {ratio:g}x"
    if pair is None:
        stopped = [s for s, run in data[name].items() if run["stopped"] is not None]
        why = "training stopped at a loss that is not finite" if stopped else f"a run does not reach {ratio}x"
        return not_testable(claim, words, why, "make results R=cwic_ablations")
    if pair[0].kl == pair[1].kl:
        return not_testable(claim, words, "what was taken out never came to bear: runs with and without it are the same",
                            "accelerate launch --num_processes 8 -m sparsity_lib.cwic llama-3.2-1b --data chats.jsonl")
    found = times_kl(pair)
    return effect(
        claim, words, f"KL with the change over KL without it, {where}, mean over {len(data[name])} seeds; {size:g} was set here",
        number=found.value, low=found.low, high=found.high, published=size, null=1.0)


def verdict_stable(data: Data, name: str, words: str, claim: str, margin: float = 25.0, ratio: float = 6.0) -> Verdict:
    """A hyperparameter that should hardly matter."""
    pair = ablation(data, name, ratio)
    if pair is None:
        return not_testable(claim, words, f"the run does not reach {ratio:g}x", "make results R=cwic_ablations")
    found = times_kl(pair)
    value, low, high = (100 * (1 - v) for v in (found.value, found.high, found.low))
    return kept(
        claim, words, f"percent by which KL at {ratio:g}x falls with {name}; a rise of {margin:g} is allowed",
        number=value, low=low, high=high, margin=margin)


def verdict_bend(data: Data, way: str = "active", name: str = "active parameters") -> Verdict:
    """A14: KL is flat up to 4.5x and rises then, each version by the ratio that its own loss counts."""
    words, claim = "KL to the teacher is stable from 2x to 4.5x, then rises", f"A14, {name}"
    start = {"ratio": 1.0, "quality": data["teal"]["uniform"]["dense"]}
    curves = [[start, *({"ratio": p["batch_ratio"], "quality": p["quality"]} for p in run["milestones"])]
              for run in runs_of(data, way)]
    end = min((max(p["ratio"] for p in points) for points in curves), default=1.0)
    if end < 5:
        return not_testable(claim, words, "the runs do not span 2x to 5x", "make results R=cwic_small")
    low, middle, high = (pooled(at_ratio(points, r) for points in curves) for r in (2.0, 4.5, end))
    late, early = np.subtract(high.kl, middle.kl) / (end - 4.5), np.subtract(middle.kl, low.kl) / 2.5
    index = resample(len(late))
    drawn = late[index].sum(1) / np.maximum(early[index].sum(1), 1e-9)
    value = late.sum() / max(early.sum(), 1e-9)
    ends = np.quantile(drawn, [0.025, 0.975])
    return effect(
        claim, words,
        f"slope of KL over the ratio of {name} from 4.5x to {end:.1f}x, over its slope from 2x to 4.5x; twice was set here",
        number=float(value), low=float(min(ends[0], value)), high=float(max(ends[1], value)), published=2.0, null=1.0)


def verdict_longer(data: Data) -> Verdict:
    """A16: training on at 6x helps."""
    both = [[next(p for p in run["milestones"] if p["at"] == at) for run in runs_of(data, "active")] for at in ("6x", "end")]
    gap = difference(*(pooled(map(quality, points)) for points in both), "nll")
    begin, end = (np.mean([p["ratio"] for p in points]) for points in both)
    return effect(
        "A16", "3,000 more steps at 6x raise the score from 43.8 to 44.5",
        f"nats per token that the last sixth of the steps, from {begin:.2f}x to {end:.2f}x, takes off; 0.01 was set here",
        number=gap.value, low=gap.low, high=gap.high, published=0.01)


def verdict_rate(data: Data) -> Verdict:
    """A15: thresholds need a learning rate of their own."""
    words, changed = "thresholds benefit from a rate scaled by sqrt(n)", "eta sqrt(n) = 1"
    pair = ablation(data, changed)
    if pair is None:
        return not_testable("A15", words, "a run stopped early", "make results R=cwic_ablations")
    reached = [np.mean([data[name][seed]["milestones"][-1]["ratio"] for seed in data[changed]]) for name in (changed, "active")]
    found = times_kl(pair)
    return effect(
        "A15", words, f"KL at the end at the weights' own rate ({reached[0]:.1f}x reached) over KL at sqrt(n) times it "
        f"({reached[1]:.1f}x reached), mean over {len(data[changed])} seeds; 1.1 was set here",
        number=found.value, low=found.low, high=found.high, published=1.1, null=1.0)


def verdict_steady(data: Data) -> Verdict:
    """F1: every further ratio costs something."""
    teal, runs = data["teal"]["uniform"], runs_of(data, "flops")
    words = "the mean score falls steadily, 57.1 to 44.0 from 1x to 6x"
    ratios = [r for r in (1.0, 2.0, 3.0, 4.0, 5.0, 5.95) if pooled_at(runs, teal, r) is not None]
    found = [pooled_at(runs, teal, r) for r in ratios]
    if len(found) < 3:
        return not_testable("F1", words, "the runs do not reach 3x", "make results R=cwic_small")
    steps = [difference(b, a, "nll") for a, b in zip(found, found[1:], strict=False)]
    least = min(range(len(steps)), key=lambda i: steps[i].value)
    return effect(
        "F1", words,
        f"nats by which the loss rises least from one ratio to the next ({ratios[least]:g}x to {ratios[least + 1]:g}x); 0.01 was "
        "set here",
        number=steps[least].value, low=steps[least].low, high=steps[least].high, published=0.01)


def small_verdicts(small: Data) -> list[Verdict]:
    """What the small Llama's schedules decide."""
    return [
        verdict_teal(small, "small-llama", "CWIC, active parameters"),
        verdict_teal(small, "small-llama", "thresholds alone, to 3x"),
        *([verdict_teal(small, "small-llama", "CWIC, active parameters", head=True)] if "head" in small["teal"] else []),
        verdict_twin(small, "3x", "the 3B model at 3.05x beats the dense 1B model by 1.6 points"),
        verdict_twin(small, "6x", "models of 2x to 6x are ahead of dense ones of their active size in part"),
        verdict_graceful(small, "small-llama", "CWIC, active parameters"),
        verdict_bend(small), verdict_bend(small, "flops", "FLOPs"), verdict_longer(small), verdict_steady(small),
    ]


def ablation_verdicts(ablations: Data) -> list[Verdict]:
    """What the small Llama's ablations decide."""
    stripes = "column sparsity instead of stripes costs 1.7 points at 3.05x"
    shapes = "stable for bandwidths from 0.05 to 0.25, unstable outside"
    return [
        verdict_more(ablations, "no stripes", stripes, "A5"),
        verdict_more(ablations, "MSE of hidden states", "MSE of hidden states in the loss costs 1.6 points at 3.05x", "A6"),
        *(verdict_stable(ablations, f"bandwidth {b}", shapes, f"A13, {b}") for b in (0.05, 0.25)),
        *(verdict_more(ablations, f"bandwidth {b}", shapes, f"A13, {b}") for b in (0.02, 0.5)),
        *(verdict_stable(ablations, f"momentum {b}", "momentum from 0.9 to 0.99 hardly matters", f"A13, momentum {b}")
          for b in (0.9, 0.95)),
        *(verdict_stable(ablations, f"{k} kernel", "kernel functions other than the rectangle gave similar performance",
                         f"A13, {k} kernel") for k in ("triangle", "gaussian")),
        verdict_rate(ablations),
        verdict_more(ablations, "flops, no warm-up", "without warm-up training collapses to chance", "F3, warm-up", size=2.0,
                     ratio=None),
        verdict_more(ablations, "flops, no normalisation", "without normalisation a moderate loss", "F4, normalisation",
                     ratio=6.0),
        verdict_more(ablations, "flops, no stripes", "without stripes near chance", "F4, stripes", size=2.0, ratio=6.0),
    ]


def limit_verdicts(small: Data, limit: Data) -> list[Verdict]:
    """What the small Llama's FLOP schedule decides without the head's limit (`cwic_limit`: seed -> run)."""
    words, both = "without head limit training collapses to chance", (list(limit.values()), runs_of(small, "flops"))
    ends = [[of_run(run, None) for run in runs] for runs in both]
    if any(None in found for found in ends):
        return [not_testable("F3, head limit", words, "a run stopped early", "make results R=cwic_limit")]
    whole, head = ([np.mean([get(run) for run in runs]) for runs in both] for get in (
        lambda run: run["milestones"][-1]["ratio"], lambda run: run["curve"]["head_ratio"][-1]))
    found = times_kl((pooled(ends[0]), pooled(ends[1])))
    return [effect(
        "F3, head limit", words, f"KL at the end without the limit (the head's own ratio at {head[0]:.1f}, the model at "
        f"{whole[0]:.1f}x) over KL with it ({head[1]:.1f}, {whole[1]:.1f}x), mean over {len(limit)} seeds; 2 was set here",
        number=found.value, low=found.low, high=found.high, published=2.0, null=1.0)]


def smol_verdicts(smol: Data) -> list[Verdict]:
    """What SmolLM2's thresholds decide."""
    rivals = (False, True) if "head" in smol["teal"] else (False,)
    return [verdict_teal(smol, "SmolLM2", way, head=head) for head in rivals for way in ways(smol) if "2x" not in way]


def verdict_smollm() -> Verdict:
    """F2 needs the papers' size."""
    return not_testable(
        "F2", "better than SmolLM of its active size on MMLU, level on WinoGrande, worse on ARC and HellaSwag",
        "takes a granular model of a billion weights; the small network's dense twins are the nearest thing here",
        "accelerate launch --num_processes 8 -m sparsity_lib.cwic llama-3.2-1b --data chats.jsonl")


def all_verdicts(small: Data, ablations: Data, smol: Data, bench: Data, limit: Data) -> list[Verdict]:
    """Every claim that the chapter tests, in the papers' order."""
    found = [small_verdicts(small), smol_verdicts(smol), ablation_verdicts(ablations), limit_verdicts(small, limit),
             bench_verdicts(bench), [verdict_smollm()]]
    return sorted((verdict for each in found for verdict in each), key=lambda verdict: order(verdict.claim))


def order(claim: str) -> tuple[str, int]:
    """A claim's id as a sort key: A2 before A13."""
    number = claim.partition(",")[0]
    return number[0], int(number[1:])
