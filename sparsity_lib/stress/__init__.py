"""Faults and bad inputs, tried on purpose, and what became of each: `make stress`.

    python -m sparsity_lib.stress                 # every trial at full size, into results/stress.json
    python -m sparsity_lib.stress --quick NAME    # some trials, smaller, and nothing is written

A trial makes many attempts. Each may end in three ways: the right result, a refusal that says what is wrong and how to fix it
(a `SparsityError`), or neither, which is called lost. Nothing may be lost.
"""
