#!/usr/bin/env bash
# Checks this project's results on the GPU of this machine, and measures its speed, in at most 8 minutes. Writes
# report.md and report.json to $OUT (default: runs/gpu). Uses the machine's own Python if it has torch, else .venv;
# installs nothing, needs no network. Arguments are passed to scripts/gpu_report.py:
#     bash scripts/gpu_report.sh --minutes 8 --sections right decode
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
pythons=(${PYTHON:-python3 .venv/bin/python}) # PYTHON may name several, or one with spaces in its path
if command -v "${PYTHON:-}" >/dev/null; then pythons=("$PYTHON"); fi
for python in "${pythons[@]}"; do
    if command -v "$python" >/dev/null && "$python" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'
    then
        missing=$("$python" -c 'import importlib.util as i, sys; print(*(m for m in sys.argv[1:] if not i.find_spec(m)))' \
            numpy tqdm jinja2 safetensors tokenizers)
        if [ -n "$missing" ]; then
            echo "gpu_report.sh: $python has torch, but lacks $missing, which transformers needs too; pip install them" >&2
            exit 2
        fi
        exec "$python" scripts/gpu_report.py --output_dir "${OUT:-runs/gpu}" "$@"
    fi
done
echo "gpu_report.sh: no python3 with torch; name one in PYTHON, or make .venv with scripts/test.sh" >&2
exit 2
