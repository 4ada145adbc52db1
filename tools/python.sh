#!/usr/bin/env bash
# Runs Python from .venv (or from $HW_VENV) where it exists, else the system's: scripts skip what they cannot import.
root=$(cd "$(dirname "$0")/.." && pwd)
python=${HW_VENV:-$root/.venv}/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$@"
