#!/usr/bin/env bash
# Everything that must pass: makes .venv if there is none, installs, lints, runs the tests in a process for each core,
# four at most. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/venv.sh
# Most of what the packages hold is never imported: what is gets compiled then, in both processes of the tests.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -r tests/requirements.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder "$@"
