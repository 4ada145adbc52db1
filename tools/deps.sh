#!/usr/bin/env bash
# deps.sh [--build]: makes sure that the Debian packages of tools/packages.txt and, without --build, of tools/packages-test.txt
# are installed: installs them as root, else prints the command.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

if ! command -v dpkg-query >/dev/null; then
  echo "not a Debian system: packages are not checked (tools/packages*.txt list what is needed)"
  exit 0
fi
lists=("$root/tools/packages.txt")
case "${1:-}" in
  "") lists+=("$root/tools/packages-test.txt") ;;
  --build) ;;
  *) echo "deps.sh: unknown argument '$1'; --build is the only one" >&2 && exit 2 ;;
esac
mapfile -t wanted < <(cat "${lists[@]}" | grep -v '^#')
missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "all ${#wanted[@]} packages are installed"
  exit 0
fi
echo "${#missing[@]} of ${#wanted[@]} packages are missing: ${missing[*]}"
if [ "$(id -u)" -ne 0 ]; then
  echo "Install them with:" >&2
  echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  # Daemons that packages bring (prometheus) are not started: they would take ports and cores from the tests.
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
# A list that cannot be refreshed is no reason to stop: the package may be known from another one.
apt-get update -q || echo "apt-get update reported errors; going on with the lists that are there" >&2
apt-get install -q -y --no-install-recommends "${missing[@]}" </dev/null
# Nor after the next boot: what is wanted of it are the programs.
case " ${missing[*]} " in
  *" prometheus "*) ! command -v systemctl >/dev/null || systemctl disable --quiet prometheus || true ;;
esac
