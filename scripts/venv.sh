#!/usr/bin/env bash
# Makes .venv with python3, or with what PYTHON names, for quickstart.sh and test.sh, unless it is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# pip comes last: without it the making of a .venv was broken off, as where the system lacks python3-venv
if [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null; then exit; fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "venv.sh: needs Python 3.11 or newer, which $python is not; name one in PYTHON, as PYTHON=python3.12" >&2
    exit 2
fi
clear=--clear # what does not run is of a Python that has gone
if [ -x .venv/bin/python ]; then clear=; fi
"$python" -m venv $clear .venv
