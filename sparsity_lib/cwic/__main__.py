"""python -m sparsity_lib.cwic: see `command`."""

import sys

from sparsity_lib.cwic.command import main

if __name__ == "__main__":
    sys.exit(main())
