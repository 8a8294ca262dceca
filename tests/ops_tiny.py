"""What the tests of the operators share, on the CPU and on the GPU."""


def gap(scores, share):
    """A threshold in the middle of a wide gap near a quantile: masks then do not hang on the order of a sum."""
    ordered = scores.flatten().sort().values
    start = int(share * len(ordered)) - len(ordered) // 20
    near = ordered[max(0, start) : start + len(ordered) // 10 + 2]
    place = near.diff().argmax()
    return float((near[place] + near[place + 1]) / 2)
