"""`make bench`: measure speed on this machine, print the tables, keep them in results/bench/."""

import sys

from sparsity_lib import results
from sparsity_lib.experiments import runnable

if __name__ == "__main__":
    sys.exit(results.main(sys.argv[1:] or [name for name in runnable() if name.startswith("bench/")]))
