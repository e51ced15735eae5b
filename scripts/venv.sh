#!/usr/bin/env bash
# Makes .venv with python3, or the interpreter in PYTHON, for quickstart.sh and test.sh, unless it exists already.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} there= clear=--clear # a .venv whose python does not run belongs to a Python that is gone
if .venv/bin/python -c '' 2>/dev/null; then python=.venv/bin/python there=yes clear=; fi
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
    echo "venv.sh: needs Python 3.11 to 3.14, as torch 2.13 does, and $python is not; name one in PYTHON, as" \
        "PYTHON=python3.12${there:+, and remove .venv}" >&2
    exit 2
fi
# pip is installed last: a .venv without it is incomplete, for instance because the system lacks python3-venv
if [ "$there" ] && .venv/bin/python -c 'import pip' 2>/dev/null; then exit; fi
"$python" -m venv $clear .venv
