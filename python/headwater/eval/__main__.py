"""python -m headwater.eval: see headwater.eval.cli."""

import importlib.util
import signal
import sys

NEEDED = ("torch", "transformers", "tokenizers", "numpy")


def main() -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"headwater.eval: {', '.join(missing)} not installed (pip install {' '.join(missing)})", file=sys.stderr)
        return 2
    from headwater.eval import cli

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is done is kept
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
