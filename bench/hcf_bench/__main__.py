"""`python -m hcf_bench ...` is `hcf bench ...`, for a host where nothing is installed."""

import sys

from hcf.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
