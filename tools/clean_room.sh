#!/usr/bin/env bash
# Proves that README's commands work on a bare Debian 12: makes a minimal chroot, clones this repository's HEAD into it and
# runs there `make demo`, `make test`, then each a second time.
#
#   sudo tools/clean_room.sh [--dir=DIR] [--keep] [demo] [test] [again]
#
# Without words all three parts run. DIR (default: a new folder in $TMPDIR or /tmp) must not exist; it is removed at the end
# unless --keep is given. Needs debootstrap and unshare. The chroot uses this machine's own package sources, proxies and
# certificates, and nothing else of it.
set -euo pipefail

if [ "$(id -u)" -ne 0 ]; then
  echo "clean_room: a chroot needs root (sudo $0)" >&2
  exit 1
fi
# Private mounts and processes: both are gone when this script ends, however it ends.
if [ -z "${HW_CLEAN_ROOM:-}" ]; then
  HW_CLEAN_ROOM=1 exec unshare --mount --pid --fork --kill-child --propagation private bash "$0" "$@"
fi

{ # read as a whole before it runs: the file may change meanwhile
root=$(cd "$(dirname "$0")/.." && pwd)
dir=
keep=no
parts=()
for argument in "$@"; do
  case $argument in
    --dir=*) dir=${argument#--dir=} ;;
    --keep) keep=yes ;;
    demo | test | again) parts+=("$argument") ;;
    *) echo "clean_room: unknown argument '$argument' (known: --dir=DIR --keep demo test again)" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(demo test again)
dir=${dir:-$(mktemp -d -u "${TMPDIR:-/tmp}/headwater-clean-room.XXXXXX")}
[ ! -e "$dir" ] || { echo "clean_room: $dir exists already" >&2; exit 1; }
. "$root/tools/bare_debian.sh"

finish() {
  status=$?
  unmount_bare "$dir"
  if [ $keep = yes ]; then echo "the chroot is kept in $dir"; else rm -rf --one-file-system "$dir"; fi
  exit $status
}
trap finish EXIT

echo "== debootstrap bookworm (minbase) into $dir"
bare_debian "$dir"
mkdir -p "$dir/src"
git clone --quiet --no-hardlinks "$root" "$dir/src/headwater"
mount_bare "$dir"

inside() { chroot "$dir" /usr/bin/env -i "${bare_environment[@]}" bash -c "$1" </dev/null; }
outcomes=()
timed() { # timed NAME COMMAND
  local begin=$SECONDS status=0
  echo "== $1: $2"
  inside "cd /src/headwater && $2" || status=$?
  local left
  left=$(inside "ps -eo comm= 2>/dev/null || cat /proc/[0-9]*/comm" | grep -c '^headwater' || true)
  outcomes+=("$1: status $status, $((SECONDS - begin)) s, $left processes left behind")
  [ $status -eq 0 ] && [ "$left" -eq 0 ]
}

echo "== git and make, which README asks for"
inside "export DEBIAN_FRONTEND=noninteractive; apt-get update -q || true; apt-get install -q -y --no-install-recommends git make" >/dev/null
failed=0
for part in "${parts[@]}"; do
  case $part in
    again)
      timed "make demo, second time" "make demo" || failed=1
      timed "make test, second time" "make test" || failed=1
      ;;
    *) timed "make $part" "make $part" || failed=1 ;;
  esac
done
echo "== outcome for $(git -C "$dir/src/headwater" rev-parse --short HEAD)"
printf '%s\n' "${outcomes[@]}"
exit $failed
}
