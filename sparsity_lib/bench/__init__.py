"""Measurements of speed: `make bench`.

Their items are computed one after another in this process, by `Checkpoint.item`, whatever SPARSITY_WORKERS and SPARSITY_CLUSTER
say: what is timed must be alone on its machine, and that must be this one.
"""
