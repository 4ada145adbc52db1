#!/usr/bin/env bash
# Makes .venv with tools/requirements.txt and the Python package of this tree; does nothing where both are unchanged.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
venv=$root/.venv
stamp=$venv/headwater.stamp

wanted=$({ cat tools/requirements.txt tools/venv.sh proto/headwater/v1/*.proto; cat python/setup.py python/pyproject.toml python/headwater/*.py python/headwater/{eval,eval/policies,ops}/*.py; } | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  echo ".venv is up to date"
  exit 0
fi
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
echo "installing $(grep -vc '^#' tools/requirements.txt) PyPI packages and ./python into .venv"
"$venv/bin/pip" install --disable-pip-version-check --quiet --requirement tools/requirements.txt
# The build requirements are in the environment already, so the build needs none of its own.
rm -rf python/build
"$venv/bin/pip" install --disable-pip-version-check --quiet --no-build-isolation --no-deps --force-reinstall ./python
rm -rf python/build
echo "$wanted" >"$stamp"
