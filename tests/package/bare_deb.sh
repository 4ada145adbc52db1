#!/usr/bin/env bash
# Installs the Debian packages of a build with apt into a bare Debian 12, starts the programs there, and builds and runs
# tests/package/downstream with what libheadwater-dev depends on and a compiler, nothing else.
#
#   sudo tests/package/bare_deb.sh BUILD
#
# Exit status 77: debootstrap, unshare or root are not to be had.
set -euo pipefail

for tool in debootstrap unshare; do
  command -v $tool >/dev/null || { echo "SKIPPED: $tool is not installed (apt-get install debootstrap util-linux)"; exit 77; }
done
if [ "$(id -u)" -ne 0 ]; then
  echo "SKIPPED: a chroot needs root (sudo $0)"
  exit 77
fi
# Private mounts and processes: both are gone when this script ends, however it ends.
if [ -z "${HW_BARE_DEB:-}" ]; then
  unshare --mount --pid --fork true 2>/dev/null || { echo "SKIPPED: unshare may not make namespaces here"; exit 77; }
  HW_BARE_DEB=1 exec unshare --mount --pid --fork --kill-child --propagation private bash "$0" "$@"
fi

root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(realpath "${1:?usage: bare_deb.sh BUILD}")
. "$root/tools/bare_debian.sh"
dir=$(mktemp -d "${TMPDIR:-/tmp}/headwater-deb.XXXXXX")
bare=$dir/debian
trap 'unmount_bare "$bare"; rm -rf --one-file-system "$dir"' EXIT
inside() { echo "== $1"; chroot "$bare" /usr/bin/env -i "${bare_environment[@]}" DEBIAN_FRONTEND=noninteractive /bin/sh -ec "$1" </dev/null; }

echo "== a bare Debian 12"
bare_debian "$bare"
mount_bare "$bare"
mkdir "$bare/packages"
(cd "$dir" && cpack --config "$build/CPackConfig.cmake" -B "$dir/cpack")
cp "$dir"/cpack/*.deb "$bare/packages/"
cp -r "$root/tests/package/downstream" "$bare/downstream"

inside "apt-get update -q"
inside "apt-get install -q -y --no-install-recommends /packages/headwater_*.deb /packages/headwater-deploy_*.deb >/dev/null"
for program in headwater headwater-coordinator headwater-worker headwater-decode; do
  inside "$program --version"
done
inside "test -f /usr/share/headwater/alerts/headwater.rules.yml"
inside "apt-get install -q -y --no-install-recommends /packages/libheadwater-dev_*.deb cmake g++ make >/dev/null"
inside "cmake -S /downstream -B /tmp/downstream && cmake --build /tmp/downstream && mkdir /tmp/kv"
inside "/tmp/downstream/receive_session /tmp/kv" | tee "$dir/said"
grep -x 'received 1536000 bytes in 96 blocks' "$dir/said"
inside "apt-get purge -q -y headwater headwater-deploy libheadwater-dev >/dev/null"
inside "test -z \"\$(find /usr /etc -name '*headwater*' 2>/dev/null)\""
echo "== the packages install, serve and go"
