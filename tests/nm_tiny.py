"""N:M pruning by its definition, one entry after the other: what every backend is compared with."""

import hashlib
import math

import torch

from sparsity_lib import ops

PATTERNS = (
    (2, 4), (4, 8), (8, 16), (16, 32), (1, 2), (1, 1), (3, 5), (7, 7), (1, 64), (33, 64), (5, 12), (1, 3), (15, 16), (2, 32))
SPECIAL = (0.0, -0.0, 0.25, -0.25, 1.0, -2.0, 3e38, 1e-40, math.inf, -math.inf, math.nan)


def kept(scores, n, m):
    """The indices kept of a list of scores: NaN first, then the largest, ties by index."""
    groups = [range(start, min(start + m, len(scores))) for start in range(0, len(scores), m)]
    order = [(0.0, 0.0) if math.isnan(score) else (1.0, -score) for score in scores]
    return [i for group in groups for i in sorted(group, key=lambda i: (order[i], i))[:n]]


def slow(x, n, m, shift=None, scale=None, back=False, repair=False):
    """Pruned x [tokens, width] in float64, and the mask."""
    found, mask = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.bool)
    zeros = torch.zeros(x.shape[1]) if shift is None else shift
    scores = (x.float() - zeros).abs() * (1 if scale is None else scale)
    for t, token in enumerate(scores.tolist()):
        mask[t, kept(token, n, m)] = True
        z = torch.where(mask[t], x[t].float() - zeros, 0).double()
        if repair:
            of_all, of_kept = (x[t].float() - zeros).double().var(correction=0), z.var(correction=0)
            z = torch.where(z == 0, 0, z * (1.0 if of_kept == 0 else (of_all / of_kept).sqrt()))
        found[t] = z + zeros if back else z
    return found, mask


def digest():
    """One number for what the operator makes of tokens that are the same everywhere."""
    draw, found = torch.Generator().manual_seed(0), hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        for (n, m), width in zip(PATTERNS, (576, 72, 160, 96, 34, 5, 333, 50, 500, 130, 48, 9, 80, 64), strict=True):
            x = torch.randint(-400, 400, (5, width), generator=draw).div(128).to(dtype)
            shift, scale = torch.randint(-9, 9, (width,), generator=draw) / 7, torch.randint(0, 9, (width,), generator=draw) / 3
            for back, repair in ((False, None), (False, "variance"), (True, "variance")):
                options = {"shift": shift, "scale": scale} if repair else {}
                for each in ops.nm_select(x, n, m, back=back, repair=repair, bits=True, pad=True, **options):
                    found.update(each.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
