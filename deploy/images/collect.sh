#!/usr/bin/env bash
# Gathers programs with the shared libraries that they load, for an image that has nothing else.
#
#   collect.sh [--loader] TARGET BIN [LIBRARY...]
#
# Programs of BIN go to TARGET/opt/headwater/bin, libraries (also the LIBRARY files, which programs open by name) to
# TARGET/opt/headwater/lib. glibc is left to the image's base; with --loader it comes too, to where programs look for it.
set -euo pipefail

loader=no
if [ "${1:-}" = --loader ]; then loader=yes; shift; fi
[ $# -ge 2 ] || { echo "usage: collect.sh [--loader] TARGET BIN [LIBRARY...]" >&2; exit 2; }
target=$1 bin=$2
shift 2
programs=(headwater-coordinator headwater-worker headwater-decode headwater)

mkdir -p "$target/opt/headwater/bin" "$target/opt/headwater/lib"
for program in "${programs[@]}"; do
  install -m 0755 "$bin/$program" "$target/opt/headwater/bin/$program"
  strip --strip-unneeded "$target/opt/headwater/bin/$program"
done
for library in "$@"; do install -m 0755 "$library" "$target/opt/headwater/lib/"; done

# What ldd names, of programs and of the libraries given.
needed=$(ldd "$target"/opt/headwater/bin/* "$@")
if grep 'not found' <<<"$needed" >&2; then
  echo "collect: the libraries above are not installed here" >&2
  exit 1
fi
glibc='^(ld-linux-x86-64|libc|libm|libdl|librt|libpthread|libresolv)\.so\.'
while read -r path; do
  name=$(basename "$path")
  if [[ ! $name =~ $glibc ]]; then
    install -m 0755 "$path" "$target/opt/headwater/lib/$name"
  elif [ $loader = yes ]; then
    mkdir -p "$target/lib/x86_64-linux-gnu" "$target/lib64"
    case $name in
      ld-linux*) install -m 0755 "$path" "$target/lib64/$name" ;;
      *) install -m 0755 "$path" "$target/lib/x86_64-linux-gnu/$name" ;;
    esac
  fi
done < <(grep -oE '(=> )?/[^ ]+ \(0x' <<<"$needed" | sed -E 's/^=> //; s/ \(0x$//' | sort -u)
