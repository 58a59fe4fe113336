#!/bin/sh
# tools/install.sh [extra,extra…]: makes .venv where there is none and installs tutelage into it, with the versions of
# constraints.txt. `make install` and `make test` call it; every refusal says in plain words what is missing.
set -eu
cd "$(dirname "$0")/.."
extras=${1:-}
venv=.venv
usable='import sys; sys.exit(sys.version_info < (3, 11))'

say() { printf '%s\n' "$*" >&2; }

find_python() {
    # PYTHON names one; else the first that is new enough and can make virtual environments.
    old="" bare=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if ! "$candidate" -c "$usable" 2>/dev/null; then
            old="$old $candidate ($("$candidate" --version 2>&1 | head -n 1))"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            bare="$bare $candidate"
        else
            python=$candidate
            return
        fi
    done
    say "tutelage needs Python 3.11 or newer with its venv module, and found none."
    [ -z "$old" ] || say "  Too old:$old"
    [ -z "$bare" ] || say "  Without venv:$bare (on Debian and Ubuntu: apt-get install python3-venv)"
    [ -n "$old$bare" ] || say "  None of these is on the PATH: ${PYTHON:-python3 python3.13 python3.12 python3.11 python}"
    say "Install one, or name one: make install PYTHON=/path/to/python3"
    exit 1
}

if ! "$venv/bin/python" -c "$usable; import pip" 2>/dev/null; then
    find_python
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

say "Installing tutelage${extras:+ with the extras $extras} into $venv."
say "The first time this fetches PyTorch and what it needs: up to 7 GB on Linux, where CUDA's libraries come with it."
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".${extras:+[$extras]}"; then
    say ""
    say "The install did not finish; pip's last lines say why. Most often one of these is missing:"
    say "  - a package index that can be reached (PIP_INDEX_URL names one's own mirror, HTTPS_PROXY a proxy);"
    say "  - free disk space: $(df -h . | awk 'NR == 2 {print $4}') is left here."
    say "Run the same command again: it goes on from what is installed already."
    exit 1
fi
