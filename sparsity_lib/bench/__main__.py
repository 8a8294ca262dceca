"""`make bench`: measure speed on this machine, print the tables, keep them in results/bench/."""

import sys

from sparsity_lib import results

if __name__ == "__main__":
    everything = ["bench/matvec", "bench/glu", "bench/decode", "bench/evaluation", "bench/calibration"]
    sys.exit(results.main(sys.argv[1:] or everything))
