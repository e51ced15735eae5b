#!/usr/bin/env bash
# Fine-tuning on chats, then DPO on pairs of answers, with Llama-3.1-8B on 8 GPUs of 80 GB.
#     bash scripts/recipes/llama_sft_dpo.sh DATA_FOLDER [MODEL] [OUT]
# DATA_FOLDER holds chats.jsonl (messages) and pairs.jsonl (prompt, chosen, rejected), each with a held-out part
# chats.eval.jsonl and pairs.eval.jsonl; UltraChat 200k and UltraFeedback Binarized on the Hub have these fields.
# The base model's folder has no chat template. TEMPLATE names a folder that has one: its tokenizer files are copied
# to a folder with links to the weights.
# Expected: not yet run on GPUs.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:?DATA_FOLDER is missing}
model=${2:-meta-llama/Llama-3.1-8B} out=${3:-runs/llama-sft-dpo} python=${PYTHON:-.venv/bin/python}
run() { "$python" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-8}" "$@"; }
finished() { [ -f "$1/config.json" ] && echo "$1: finished before; remove the folder to train again"; }
for part in chats chats.eval pairs pairs.eval; do
    [ -f "$data/$part.jsonl" ] || { echo "$data/$part.jsonl is missing" >&2; exit 2; }
done
model=$(PYTHON="$python" bash scripts/model.sh "$model")
if [ -n "${TEMPLATE:-}" ]; then
    mkdir -p "$out/base"
    ln -sf "$(realpath "$model")"/*.json "$(realpath "$model")"/*.safetensors "$out/base"
    rm -f "$out/base"/{tokenizer*,special_tokens_map.json,chat_template*,checksums.json}
    for file in "$TEMPLATE"/{tokenizer*,special_tokens_map.json,chat_template*}; do
        [ ! -f "$file" ] || cp "$file" "$out/base"
    done
    model=$out/base
fi

finished "$out/sft" || run training/finetune_sft.py --resume --checkpoint_path "$model" --output_dir "$out/sft" \
    --train_file "$data/chats.jsonl" --eval_file "$data/chats.eval.jsonl" --eval_steps 100 --pack \
    --max_seq_len 4096 --overlong truncate --batch_size 128 --micro_batch_size 2 \
    --activation_checkpointing selective --num_epochs 1 --learning_rate 1e-5
run training/train_dpo.py --resume --checkpoint_path "$out/sft" --output_dir "$out/dpo" --train_file "$data/pairs.jsonl" \
    --eval_file "$data/pairs.eval.jsonl" --eval_steps 50 --beta 0.1 --max_seq_len 2048 --overlong skip --batch_size 128 \
    --max_tokens_per_micro_batch 16384 --activation_checkpointing selective --num_epochs 1 --learning_rate 5e-7
