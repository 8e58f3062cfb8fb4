# Shared by the scripts: what they say, and what they make sure of. Sourced, never run.

say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'next: %s\n' "$2" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "root is needed to run: $*" "run this as root, or install sudo"
  fi
}

# Installs Debian packages without letting any of them start a service.
install_packages() {
  command -v apt-get >/dev/null || die "missing packages: $*" "install them with your distribution's package manager"
  say "Installing Debian packages: $*"
  local policy=/usr/sbin/policy-rc.d made=no
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    made=yes
  fi
  local ok=yes
  { as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2 || ok=no
  [ "$made" = no ] || as_root rm -f "$policy"
  [ "$ok" = yes ] || die "could not install: $*" "see the messages above"
}

# Sets PYTHON to an interpreter of 3.10 or newer that can make environments.
ensure_python() {
  local candidate
  if [ -z "${PYTHON:-}" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
      if command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        PYTHON=$candidate
        break
      fi
    done
  fi
  [ -n "${PYTHON:-}" ] || die "no python3 of 3.10 or newer was found" "install one, or name it: PYTHON=/path/to/python3"
  if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    install_packages "python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  fi
}

ensure_mosquitto() {
  PATH=$PATH:/usr/sbin
  if ! command -v mosquitto >/dev/null || ! command -v mosquitto_sub >/dev/null; then
    install_packages mosquitto mosquitto-clients
  fi
}

# PYTHON-OF-THE-ENVIRONMENT: what the microphone's tests open. A demo needs none.
ensure_portaudio() {
  if ! "$1" -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("portaudio") is None)'; then
    install_packages libportaudio2
  fi
}
