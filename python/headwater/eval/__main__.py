"""python -m headwater.eval: see headwater.eval.cli."""

import sys

from headwater.eval.start import start


def main() -> int:
    return start("headwater.eval")


if __name__ == "__main__":
    sys.exit(main())
