"""python -m headwater.patterns: see headwater.patterns.cli."""

import sys

from headwater.eval.start import NEEDED, start

if __name__ == "__main__":
    sys.exit(start("headwater.patterns", (*NEEDED, "matplotlib")))
