"""What the commands python -m headwater.eval, .cluster and .patterns do before their own imports."""

import importlib
import importlib.util
import signal
import sys
from typing import Sequence

NEEDED = ("torch", "transformers", "tokenizers", "numpy")


def start(program: str, needed: Sequence[str] = NEEDED) -> int:
    """Runs main() of the package's module `cli`. Status 2: a package that it needs is not installed."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{program}: {', '.join(missing)} not installed (pip install {' '.join(missing)})", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is done is kept
    try:
        return importlib.import_module(f"{program}.cli").main()
    except KeyboardInterrupt:
        print(f"{program}: broken off", file=sys.stderr)
        return 130
