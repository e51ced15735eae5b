#!/usr/bin/env bash
# GRPO on GSM8K with a model that thinks before it answers: DeepSeek-R1-Distill-Qwen-1.5B on one GPU of 80 GB.
#     bash scripts/recipes/gsm8k_grpo_r1.sh GSM8K_FOLDER [MODEL] [OUT]
# Answers have up to 4,096 tokens, the last 1,024 of which cost reward (DAPO's soft overlong punishment); truncated
# answers are not learnt; groups that are all right or all wrong are resampled. Expected: not yet run on a GPU.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:?GSM8K_FOLDER is missing}
model=${2:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B} out=${3:-runs/gsm8k-grpo-r1} python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
for part in train test; do
    [ -f "$out/$part.jsonl" ] || "$python" scripts/recipes/gsm8k.py --input_file "$data/$part.jsonl" \
        --output_file "$out/$part.jsonl" --max_records "${RECORDS:-10000}"
done
model=$(PYTHON="$python" bash scripts/model.sh "$model")
head -n 256 "$out/test.jsonl" >"$out/held_out.jsonl"
"$python" training/train_grpo.py --resume --checkpoint_path "$model" --output_dir "$out/policy" \
    --prompt_file "$out/train.jsonl" --eval_prompt_file "$out/held_out.jsonl" --eval_steps 20 \
    --reward_fn training/graders.py:math_answer --loss_type dapo --num_generations 8 \
    --max_resamples 2 --mask_truncated_completions --soft_punish_cache "${CACHE:-1024}" --temperature 0.6 --tis_cap 2 \
    --rollout_batch_size 128 --max_tokens_per_micro_batch 16384 --max_new_tokens "${TOKENS:-4096}" \
    --activation_checkpointing full --optim adamw_8bit \
    --learning_rate 1e-6 --lr_schedule constant --warmup_ratio 0 --total_steps "${STEPS:-200}" ${MORE:-}

"$python" inference/generate.py --resume --checkpoint_path "$out/policy" --prompt_file "$out/test.jsonl" \
    --temperature 0.6 --num_samples 4 --max_new_tokens "${TOKENS:-4096}" --output_file "$out/answers.jsonl"
"$python" inference/score.py --resume --data_file "$out/answers.jsonl" --output_file "$out/graded.jsonl" \
    --grader training/graders.py:math_answer --pass_at 1 4
