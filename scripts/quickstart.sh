#!/usr/bin/env bash
# From nothing to a model that adds up, in a few minutes and without any download but the Python packages:
# writes a toy world (scripts/toy.py), fine-tunes its model, and compares held-out accuracy before and after.
# Everything lands in runs/toy; a second run replaces that folder. A GPU is used if there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/toy
python=.venv/bin/python
step() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

if [ ! -x "$python" ]; then
    step "Python environment in .venv"
    python3 -m venv .venv
fi
"$python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt

if [ -e "$out" ]; then
    if [ ! -f "$out/toy.json" ]; then
        echo "quickstart: $PWD/$out was not made by this script; move it away and run again" >&2
        exit 2
    fi
    rm -r "$out"
fi

SECONDS=0 # the clock starts after the installation
step "A toy world: a random model, a tokenizer, problems"
"$python" scripts/toy.py --output_dir "$out"

generate() { # the held-out problems, all in one batch run, the most likely answer to each
    "$python" inference/generate.py --checkpoint_path "$1" --prompt_file "$out/heldout.jsonl" --output_file "$2" \
        --max_new_tokens 64 --temperature 0 --batch_size 64
    "$python" scripts/toy.py --output_dir "$out" --score "$2" | tee "$2.score"
}

step "Held-out problems before training"
generate "$out/model" "$out/before.jsonl"

step "Supervised fine-tuning"
"$python" training/finetune_sft.py --checkpoint_path "$out/model" --output_dir "$out/sft" \
    --train_file "$out/train.jsonl" --eval_file "$out/heldout.jsonl" \
    --batch_size 64 --num_epochs 1 --learning_rate 2e-3 --lr_schedule cosine --warmup_ratio 0.1

step "The same problems after training"
generate "$out/sft" "$out/after.jsonl"

step "Done"
echo "before: $(tail -n 1 "$out/before.jsonl.score")"
echo "after:  $(tail -n 1 "$out/after.jsonl.score")"
echo "Ask it: $python inference/generate.py --checkpoint_path $out/sft --temperature 0 --prompt \$'7+5+9+4\\n'"
