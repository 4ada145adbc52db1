"""python -m headwater.calibrate: see headwater.calibrate.cli."""

import sys

from headwater.eval.start import start

if __name__ == "__main__":
    sys.exit(start("headwater.calibrate"))
