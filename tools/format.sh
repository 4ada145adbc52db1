#!/usr/bin/env bash
# Formats the C++ sources in place; --check only names those that differ (exit 1), 77 where clang-format 14 is absent.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=$(command -v clang-format-14 || command -v clang-format || true)
if [ -z "$tool" ] || ! "$tool" --version | grep -q 'version 14\.'; then
  echo "SKIPPED: clang-format 14 is not installed (apt-get install clang-format-14)"
  exit 77
fi
mapfile -t files < <(git ls-files --cached --others --exclude-standard '*.cc' '*.h' '*.cu' '*.cuh')
if [ "${1:-}" = --check ]; then
  "$tool" --dry-run --Werror "${files[@]}"
  echo "${#files[@]} files are formatted"
else
  "$tool" -i "${files[@]}"
fi
