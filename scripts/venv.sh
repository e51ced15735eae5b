#!/usr/bin/env bash
# Makes .venv with python3, or with what PYTHON names, for quickstart.sh and test.sh, unless it is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} made=
# pip comes last: without it the making of a .venv was broken off, as where the system lacks python3-venv
if [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null; then python=.venv/bin/python made=yes; fi
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
    echo "venv.sh: needs Python 3.11 to 3.14, as torch 2.13 does, which $python is not; name one in PYTHON, as" \
        "PYTHON=python3.12${made:+, and remove .venv}" >&2
    exit 2
fi
if [ "$made" ]; then exit; fi
clear=--clear # what does not run is of a Python that has gone
if [ -x .venv/bin/python ]; then clear=; fi
"$python" -m venv $clear .venv
