"""python -m headwater.cluster: see headwater.cluster.cli."""

import sys

from headwater.eval.start import start

if __name__ == "__main__":
    sys.exit(start("headwater.cluster"))
