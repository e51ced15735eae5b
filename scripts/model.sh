#!/usr/bin/env bash
# Prints the folder of a model: MODEL itself if it is one, else the folder into which download.py puts the Hub's model of
# that name, which is not asked for again unless its download was interrupted.
#     bash scripts/model.sh MODEL
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:?MODEL is missing}
if [ ! -d "$model" ]; then
    there=checkpoints/$model
    if [ ! -f "$there/config.json" ] || compgen -G "$there/.cache/huggingface/download/*.incomplete" >/dev/null; then
        "${PYTHON:-.venv/bin/python}" scripts/download.py "$model" >&2
    fi
    model=$there
fi
echo "$model"
