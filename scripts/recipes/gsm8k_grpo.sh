#!/usr/bin/env bash
# GRPO with checked answers on GSM8K, with a Qwen2.5 model on one GPU.
#     bash scripts/recipes/gsm8k_grpo.sh GSM8K_FOLDER [MODEL] [OUT]
# GSM8K_FOLDER holds train.jsonl and test.jsonl as published (github.com/openai/grade-school-math); MODEL is a folder or
# a name on the Hub: Qwen/Qwen2.5-0.5B-Instruct or Qwen/Qwen2.5-1.5B-Instruct.
# Expected: not yet run on a GPU. Memory of training: scripts/benchmark.py memory --preset 1.5b --batch_size 32 --seq_len 512
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:?GSM8K_FOLDER is missing}
model=${2:-Qwen/Qwen2.5-0.5B-Instruct} out=${3:-runs/gsm8k-grpo} python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
for part in train test; do
    [ -f "$out/$part.jsonl" ] || "$python" scripts/recipes/gsm8k.py --input_file "$data/$part.jsonl" \
        --output_file "$out/$part.jsonl" --max_records "${RECORDS:-10000}"
done
model=$(PYTHON="$python" bash scripts/model.sh "$model")
head -n 256 "$out/test.jsonl" >"$out/held_out.jsonl"

"$python" training/train_grpo.py --resume --checkpoint_path "$model" --output_dir "$out/policy" \
    --prompt_file "$out/train.jsonl" --eval_prompt_file "$out/held_out.jsonl" --eval_steps 20 \
    --reward_fn training/graders.py:math_answer --loss_type dapo --epsilon_high 0.28 --num_generations 8 \
    --rollout_batch_size 512 --minibatch_size 256 --max_tokens_per_micro_batch 16384 --max_new_tokens 512 \
    --learning_rate 1e-6 --lr_schedule constant --warmup_ratio 0 --total_steps "${STEPS:-200}" ${MORE:-}

"$python" inference/generate.py --resume --checkpoint_path "$out/policy" --prompt_file "$out/test.jsonl" \
    --max_new_tokens 512 --temperature 0 --batch_size 128 --output_file "$out/answers.jsonl"
"$python" inference/score.py --resume --data_file "$out/answers.jsonl" --output_file "$out/graded.jsonl" \
    --grader training/graders.py:math_answer --pass_at 1
