#!/usr/bin/env bash
# PPO with a critic and checked answers on GSM8K, with deepseek-llm-7b-chat on 8 GPUs of 80 GB.
#     bash scripts/recipes/gsm8k_ppo.sh GSM8K_FOLDER [MODEL] [OUT]
# Expected: not yet run on GPUs. A published run of this size (verl's baselines) solves 69.5 to 70.5 % of the test set.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:?GSM8K_FOLDER is missing}
model=${2:-deepseek-ai/deepseek-llm-7b-chat} out=${3:-runs/gsm8k-ppo} python=${PYTHON:-.venv/bin/python}

mkdir -p "$out"
for part in train test; do
    [ -f "$out/$part.jsonl" ] || "$python" scripts/recipes/gsm8k.py --input_file "$data/$part.jsonl" \
        --output_file "$out/$part.jsonl" --max_records "${RECORDS:-10000}"
done
model=$(PYTHON="$python" bash scripts/model.sh "$model")

"$python" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-8}" training/train_ppo.py --resume \
    --checkpoint_path "$model" --output_dir "$out/policy" \
    --prompt_file "$out/train.jsonl" --eval_prompt_file "$out/test.jsonl" --eval_steps 10 \
    --reward_fn training/graders.py:math_answer --kl_coef 0.001 --whiten_rewards --missing_eos_penalty 0.5 \
    --rollout_batch_size 1024 --minibatch_size 256 --ppo_epochs 1 --max_prompt_len 512 --overlong skip \
    --max_new_tokens 512 --max_tokens_per_micro_batch 16384 --activation_checkpointing selective \
    --learning_rate 1e-6 --value_learning_rate 1e-5 --lr_schedule constant --warmup_ratio 0 \
    --total_steps "${STEPS:-105}" ${MORE:-}
