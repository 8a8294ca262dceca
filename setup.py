"""The compiled CPU operators; everything else about the package is in pyproject.toml.

No torch headers (they would make torch a build dependency), no -march=native (the instruction set is chosen at run time),
no -fopenmp (the threads are torch's). Without a compiler the package installs all the same, and plain PyTorch does the work.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels/cpu")

setup(
    ext_modules=[
        Extension(
            "sparsity_lib.ops._cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra", "-g0"],
            language="c++",
            optional=True,
        )
    ]
)
