#!/usr/bin/env bash
# Replays a container file's steps without a container engine, so that the file cannot rot: each stage is a folder, its base an empty one
# or a bare Debian 12 (not the very image that FROM names), RUN runs there in a chroot, and the last stage's programs are started.
#
#   sudo tools/replay_image.sh [--file=deploy/images/cpu.Dockerfile] [--prebuilt=DIR] [--dir=DIR] [--keep]
#
# --prebuilt takes the programs from DIR instead of the step after the comment "replay: compile", which takes most of the time;
# they must be of this tree. The files are this work tree's, less what git ignores. DIR (default: a new folder in $TMPDIR or /tmp) must
# not exist and is removed at the end unless --keep is given. Exit status 77: debootstrap, unshare or root are not to be had.
set -euo pipefail

for tool in debootstrap unshare; do
  command -v $tool >/dev/null || { echo "SKIPPED: $tool is not installed (apt-get install debootstrap util-linux)"; exit 77; }
done
if [ "$(id -u)" -ne 0 ]; then
  echo "SKIPPED: a chroot needs root (sudo $0)"
  exit 77
fi
# Private mounts and processes: both are gone when this script ends, however it ends.
if [ -z "${HW_REPLAY_IMAGE:-}" ]; then
  unshare --mount --pid --fork true 2>/dev/null || { echo "SKIPPED: unshare may not make namespaces here"; exit 77; }
  HW_REPLAY_IMAGE=1 exec unshare --mount --pid --fork --kill-child --propagation private bash "$0" "$@"
fi

{ # read as a whole before it runs: the file may change meanwhile
root=$(cd "$(dirname "$0")/.." && pwd)
file=deploy/images/cpu.Dockerfile
prebuilt=
dir=
keep=no
for argument in "$@"; do
  case $argument in
    --file=*) file=${argument#--file=} ;;
    --prebuilt=*) prebuilt=$(realpath "${argument#--prebuilt=}") ;;
    --dir=*) dir=${argument#--dir=} ;;
    --keep) keep=yes ;;
    *) echo "replay_image: unknown argument '$argument' (known: --file=FILE --prebuilt=DIR --dir=DIR --keep)" >&2; exit 2 ;;
  esac
done
cd "$root"
. tools/bare_debian.sh
dir=${dir:-$(mktemp -d -u "${TMPDIR:-/tmp}/headwater-image.XXXXXX")}
[ ! -e "$dir" ] || { echo "replay_image: $dir exists already" >&2; exit 1; }
mkdir -p "$dir"

number=-1
finish() {
  local status=$? i
  umount "$stage/tmp" "$stage" 2>/dev/null || true
  for ((i = 0; i <= number; i++)); do unmount_bare "$dir/stage$i"; done
  if [ $keep = yes ]; then echo "the stages are kept in $dir"; else rm -rf --one-file-system "$dir"; fi
  exit $status
}
trap finish EXIT
fail() { echo "replay_image: $file: $*" >&2; exit 1; }

declare -A stages=()
stage=
where=/
user=
declare -a environment=()

from() { # from BASE [AS NAME]
  [ -z "$stage" ] || unmount_bare "$stage"
  number=$((number + 1))
  stage=$dir/stage$number where=/ user=
  environment=("${bare_environment[@]}")
  case $1 in
    scratch) mkdir "$stage" ;;
    debian:bookworm-[0-9]*-slim)
      if [ ! -d "$dir/debian" ]; then bare_debian "$dir/debian"; fi
      cp -a "$dir/debian" "$stage"
      mount_bare "$stage"
      ;;
    *) fail "FROM $1 is not replayed (known: scratch, debian:bookworm-DATE-slim)" ;;
  esac
  if [ "${2:-}" = AS ]; then stages[$3]=$stage; fi
}

copy() { # copy [--from=STAGE] SOURCE... TARGET
  local source=$dir/context
  if [[ $1 == --from=* ]]; then
    source=${stages[${1#--from=}]:-}
    [ -n "$source" ] || fail "COPY $1: there is no such stage"
    shift
  fi
  local target=${!#} path
  case $target in
    /*) target=$stage$target ;;
    *) target=$stage$where/$target ;;
  esac
  for path in "${@:1:$#-1}"; do
    [ -e "$source/$path" ] || fail "COPY: there is no $path"
    if [ -d "$source/$path" ]; then
      mkdir -p "$target"
      cp -a "$source/$path/." "$target"
    else
      if [[ $target == */ ]]; then mkdir -p "$target"; else mkdir -p "$(dirname "$target")"; fi
      cp -a "$source/$path" "$target"
    fi
  done
}

inside() { chroot "$stage" /usr/bin/env -i "${environment[@]}" /bin/sh -c "cd $where && $1" </dev/null; }

compile_next=no
step() { # step INSTRUCTION REST
  echo "== $1 $2"
  local -a words
  read -ra words <<<"$2"
  case $1 in
    FROM) from "${words[@]}" ;;
    WORKDIR) where=$2; mkdir -p "$stage$where" ;;
    COPY) copy "${words[@]}" ;;
    ENV) environment+=("${words[@]}") ;;
    USER) user=$2 ;;
    RUN)
      if [ $compile_next = yes ] && [ -n "$prebuilt" ]; then
        echo "   programs of --prebuilt instead"
        mkdir -p "$stage$where/build/release/bin"
        cp "$prebuilt"/headwater{,-coordinator,-worker,-decode} "$stage$where/build/release/bin/"
      else
        inside "$2"
      fi
      compile_next=no
      ;;
    *) fail "$1 is not replayed" ;;
  esac
}

mkdir "$dir/context"
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- --ignore-failed-read | tar --extract -C "$dir/context"
[ -f "$dir/context/$file" ] || fail "there is no such file"
line=
while IFS= read -r part; do
  case $part in
    '# replay: compile') compile_next=yes; continue ;;
    '#'*) continue ;;
  esac
  line+=$part
  if [[ $line == *\\ ]]; then line=${line%\\}; continue; fi
  if [ -n "$line" ]; then step "${line%% *}" "${line#* }"; fi
  line=
done <"$dir/context/$file"

echo "== the last stage: $(du -smx "$stage" | cut -f1) MiB, user $user"
[[ $user =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "USER '$user' is not two numbers over 0"
[ -d "$stage/tmp" ] || fail "the image has no /tmp"
# As a pod runs it: that user, nothing to write but /tmp.
mount --bind "$stage" "$stage"
mount -o remount,bind,ro "$stage"
mkdir -p "$dir/tmp"
chmod 1777 "$dir/tmp"
mount --bind "$dir/tmp" "$stage/tmp"
# The variables of the file's ENV lines alone; a program is looked up in their PATH.
variables=("${environment[@]:${#bare_environment[@]}}")
search=$(printf '%s\n' "${variables[@]}" | sed -n 's/^PATH=//p' | cut -d: -f1)
start=(env -i "${variables[@]}" "$(command -v chroot)" "--userspec=$user" "$stage")
for program in headwater-coordinator headwater-worker headwater-decode; do
  "${start[@]}" "$search/$program" --help </dev/null | grep -- '--listen=' >/dev/null || fail "$program --help lists no --listen"
  echo "$program starts"
done
"${start[@]}" "$search/headwater-coordinator" --listen=127.0.0.1:0 --metrics= </dev/null >"$dir/log" 2>&1 &
coordinator=$!
for ((i = 0; i < 100; i++)); do
  address=$(grep -oE '127\.0\.0\.1:[1-9][0-9]*' "$dir/log" | head -1 || true)
  if [ -n "$address" ]; then break; fi
  sleep 0.1
done
[ -n "$address" ] || fail "the coordinator named no address within 10 s: $(cat "$dir/log")"
"${start[@]}" "$search/headwater" workers --coordinator="$address" </dev/null || fail "headwater workers found no coordinator at $address"
kill -TERM $coordinator
wait $coordinator || fail "the coordinator ended with status $?: $(cat "$dir/log")"
echo "== $file is replayed"
exit 0
}
