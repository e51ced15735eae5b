#!/usr/bin/env bash
# Whether this project is right on the GPU of this machine, and how fast: report.md and report.json in $OUT (runs/gpu),
# in at most 8 minutes. Takes the machine's own Python where it has torch, else .venv; installs nothing, needs no
# network. Arguments go to scripts/gpu_report.py:
#     bash scripts/gpu_report.sh --minutes 8 --sections right decode
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in ${PYTHON:-python3 .venv/bin/python}; do
    if command -v "$python" >/dev/null && "$python" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'
    then
        exec "$python" scripts/gpu_report.py --output_dir "${OUT:-runs/gpu}" "$@"
    fi
done
echo "gpu_report.sh: no python3 with torch; name one in PYTHON, or run scripts/test.sh, which makes .venv" >&2
exit 2
