#!/usr/bin/env bash
# Runs all checks: makes .venv if there is none, installs packages, lints, runs the tests with one process per core, at
# most four. Arguments are passed to pytest.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/venv.sh
# --no-compile saves time: most modules of the packages are never imported, and the others are compiled on import.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -r tests/requirements.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# A test process that is gone (a crash, or a test of 10 minutes) ends the run: with a new one, xdist waits without end.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist loadgroup \
  --no-loadscope-reorder "$@"
