# Functions for scripts that work in a bare Debian 12 of their own; to be sourced, as root, within private mounts.
# shellcheck shell=bash

# bare_debian DIR: debootstrap's smallest Debian 12, with what lets it reach the same registries as this machine: sources, keys,
# proxies, certificates, name resolution; nothing else of this machine.
bare_debian() {
  local dir=$1 mirror
  command -v debootstrap >/dev/null || { echo "debootstrap is not installed (apt-get install debootstrap)" >&2; return 1; }
  # The machine's own mirror of Debian 12, as its package lists name it.
  mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "bookworm" && $2 == "main" { print $3; exit }')
  [ -n "$mirror" ] || { echo "no Debian 12 package list here (run apt-get update)" >&2; return 1; }
  debootstrap --variant=minbase bookworm "$dir" "$mirror" >"$dir.debootstrap.log" 2>&1 || { tail "$dir.debootstrap.log" >&2; return 1; }
  rm -f "$dir.debootstrap.log"

  local path
  rm -f "$dir/etc/apt/sources.list"
  for path in /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/trusted.gpg.d /etc/apt/auth.conf.d \
    /etc/pip.conf /root/.config/pip /root/.pip /usr/local/share/ca-certificates /etc/ssl/certs/ca-certificates.crt \
    /etc/resolv.conf /etc/hosts; do
    [ -e "$path" ] || continue
    mkdir -p "$dir$(dirname "$path")"
    rm -rf "${dir:?}$path"
    cp -rL "$path" "$dir$path"
  done
  cp -n /usr/share/keyrings/* "$dir/usr/share/keyrings/" 2>/dev/null || true
  apt-config dump | grep -E '^Acquire::(http|https|ftp|Retries|Check-|ForceIPv)' >"$dir/etc/apt/apt.conf.d/99clean-room" || true
}

# mount_bare DIR, unmount_bare DIR: what programs in it expect to be mounted.
mount_bare() {
  mkdir -p "$1/dev/pts" "$1/dev/shm"
  mount -t proc proc "$1/proc"
  mount -t devpts -o newinstance,ptmxmode=0666 devpts "$1/dev/pts"
  mount -t tmpfs -o mode=1777 tmpfs "$1/dev/shm"
}
unmount_bare() { umount -R "$1/proc" "$1/dev/pts" "$1/dev/shm" 2>/dev/null || true; }

# The environment of commands in it, for env -i.
bare_environment=(HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb)
while IFS= read -r name; do
  bare_environment+=("$name=${!name}")
done < <(compgen -e | grep -iE '^((https?|no|all|ftp)_proxy|PIP_.*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)$' || true)
