#!/usr/bin/env bash
# Trains a process reward model on easy problems and uses it on harder ones: deepseek-math-7b on 8 GPUs of 80 GB,
# fine-tuning, process reward, best of n, PPO (Easy-to-Hard Generalization, Sun et al. 2024, arXiv 2403.09472).
#     bash scripts/recipes/easy_to_hard.sh DATA_FOLDER [MODEL] [OUT]
# DATA_FOLDER holds sft.jsonl (prompt, completion: worked solutions of easy problems, a step per line), steps.jsonl
# (prompt, completions, labels: PRM800K's steps of easy problems), hard.jsonl (prompt, answer) and held_out.jsonl.
# Expected: not yet run on GPUs. The paper's 7B model, trained from Llemma, reaches 34.0 % on MATH500 with PPO.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:?DATA_FOLDER is missing}
model=${2:-deepseek-ai/deepseek-math-7b-base} out=${3:-runs/easy-to-hard} python=${PYTHON:-.venv/bin/python}
run() { "$python" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-8}" "$@"; }
finished() { [ -f "$1/config.json" ] && echo "$1: finished before; remove the folder to train again"; }
for part in sft steps hard held_out; do
    [ -f "$data/$part.jsonl" ] || { echo "$data/$part.jsonl is missing" >&2; exit 2; }
done
model=$(PYTHON="$python" bash scripts/model.sh "$model")
finished "$out/sft" || run training/finetune_sft.py --resume --checkpoint_path "$model" --output_dir "$out/sft" \
    --train_file "$data/sft.jsonl" --pack --max_seq_len 1024 --batch_size 64 --num_epochs 3 --learning_rate 2e-5
finished "$out/prm" || run training/train_rm.py --resume --loss process --checkpoint_path "$out/sft" \
    --output_dir "$out/prm" --train_file "$data/steps.jsonl" --max_tokens_per_micro_batch 16384 --batch_size 128 \
    --learning_rate 2e-6
run inference/generate.py --resume --checkpoint_path "$out/sft" --prompt_file "$data/held_out.jsonl" --num_samples 64 \
    --temperature 0.7 --max_new_tokens 768 --batch_size 256 --output_file "$out/samples.jsonl"
run inference/score.py --resume --checkpoint_path "$out/prm" --data_file "$out/samples.jsonl" \
    --output_file "$out/best.jsonl" --best_of_n --aggregate prod
"$python" inference/score.py --resume --data_file "$out/best.jsonl" --output_file "$out/best.graded.jsonl" \
    --grader training/graders.py:math_answer --pass_at 1
run training/train_ppo.py --resume --checkpoint_path "$out/sft" --output_dir "$out/ppo" --prompt_file "$data/hard.jsonl" \
    --eval_prompt_file "$data/held_out.jsonl" --eval_steps 10 --reward_checkpoint_path "$out/prm" --process_reward steps \
    --value_checkpoint_path "$out/prm" --reward_fn training/graders.py:math_answer --missing_eos_penalty 1 \
    --kl_coef 0.01 --rollout_batch_size 512 --minibatch_size 128 --ppo_epochs 2 --max_new_tokens 768 \
    --max_tokens_per_micro_batch 16384 --activation_checkpointing selective --learning_rate 1e-6 \
    --total_steps "${STEPS:-100}" ${MORE:-}
