"""What the tests of the operators share, on the CPU and on the GPU."""

from sparsity_lib import ops


def in_stripes(rule, weight, packed, **how):
    """(weight packed for a rule, the rule as the operators take it): "stripe" in it is how its weight is packed."""
    if "stripe" not in rule:
        return packed, rule
    rest = {name: each for name, each in rule.items() if name != "stripe"}
    return ops.pack(weight, "inputs", stripe=rule["stripe"], **how), rest


def gap(scores, share):
    """A threshold in the middle of a wide gap near a quantile: masks then do not hang on the order of a sum."""
    ordered = scores.flatten().sort().values
    start = int(share * len(ordered)) - len(ordered) // 20
    near = ordered[max(0, start) : start + len(ordered) // 10 + 2]
    place = near.diff().argmax()
    return float((near[place] + near[place + 1]) / 2)
