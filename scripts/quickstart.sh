#!/usr/bin/env bash
# From random weights to a model that adds up, in minutes; nothing is downloaded but Python packages. Writes a toy world
# (scripts/toy.py), then runs fine-tuning, a reward model, best of n, DPO, PPO and GRPO, each measured on held-out
# problems. All results are in runs/toy (see REPORT.md); a second run replaces them. Uses a GPU if there is one.
#     bash scripts/quickstart.sh            one seed
#     bash scripts/quickstart.sh 0 1 2      three seeds, in runs/toy, runs/toy-1, runs/toy-2; reports mean and deviation
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."

seeds=("${@:-0}")
python=.venv/bin/python
folder() { if [ "$1" = "${seeds[0]}" ]; then echo runs/toy; else echo "runs/toy-$1"; fi; }
step() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

if [ "$(printf '%s\n' "${seeds[@]}" | grep -E '^(0|[1-9][0-9]*)$' | sort -u | wc -l)" -ne ${#seeds[@]} ]; then
    echo "quickstart: the seeds must be different whole numbers, not: ${seeds[*]}" >&2
    exit 2
fi
step "Python environment in .venv"
bash scripts/venv.sh
# matplotlib only draws the curves
"$python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt 'matplotlib>=3.8,<4'

for seed in "${seeds[@]}"; do
    out=$(folder "$seed")
    if [ -e "$out" ] && [ ! -f "$out/toy.json" ]; then
        echo "quickstart: $PWD/$out was not made by this script; move it away and run again" >&2
        exit 2
    fi
done

SECONDS=0 # the clock starts after the installation
began=0
clock() { # STAGE: records the seconds since the last call as this stage's, for the report
    printf '{"stage": "%s", "seconds": %d}\n' "$1" $((SECONDS - began)) >>"$out/seconds.jsonl"
    began=$SECONDS
}
generate() { # MODEL OUTPUT PROMPTS [flags of generate.py]
    "$python" inference/generate.py --checkpoint_path "$1" --output_file "$2" --prompt_file "$3" --seed "$seed" \
        --max_new_tokens 48 --batch_size 128 "${@:4}"
}
measure() { # STAGE: draws and grades the greedy answer and 8 samples for each held-out problem
    generate "$out/$1" "$out/samples/$1.greedy.jsonl" "$out/heldout.jsonl" --temperature 0
    generate "$out/$1" "$out/samples/$1.sampled.jsonl" "$out/heldout.jsonl" --num_samples 8 --return_token_ids
    "$python" scripts/toy.py --output_dir "$out" --score "$out/samples/$1.greedy.jsonl"
    "$python" scripts/toy.py --output_dir "$out" --score "$out/samples/$1.sampled.jsonl" --num_shown 0
}
reward() { # STAGE OUTPUT [flags of score.py]: scores the stage's samples with the reward model
    "$python" inference/score.py --checkpoint_path "$out/rm" --data_file "$out/samples/$1.sampled.jsonl" \
        --output_file "$out/samples/$2.jsonl" --batch_size 128 --normalize "${@:3}"
}

for seed in "${seeds[@]}"; do
    out=$(folder "$seed")
    rm -rf "$out"
    step "Seed $seed: random model, tokenizer, problems"
    "$python" scripts/toy.py --output_dir "$out" --seed "$seed"
    generate "$out/model" "$out/samples/model.greedy.jsonl" "$out/heldout.jsonl" --temperature 0
    clock model

    step "Supervised fine-tuning on demonstrations of mixed quality"
    "$python" training/finetune_sft.py --checkpoint_path "$out/model" --output_dir "$out/sft" --seed "$seed" \
        --train_file "$out/train.jsonl" --eval_file "$out/heldout.jsonl" \
        --eval_steps 100 --batch_size 32 --num_epochs 1 --learning_rate 1e-3 --lr_schedule cosine --warmup_ratio 0.1
    measure sft
    clock sft

    step "Reward model from pairs of right and wrong samples of the fine-tuned model"
    generate "$out/sft" "$out/samples/prompts.jsonl" "$out/prompts.jsonl" --num_samples 8
    "$python" scripts/toy.py --samples "$out/samples/prompts.jsonl" \
        --pairs_file "$out/pairs.jsonl" --steps_file "$out/steps.jsonl"
    "$python" scripts/toy.py --samples "$out/samples/sft.sampled.jsonl" --pairs_file "$out/heldout_pairs.jsonl"
    "$python" training/train_rm.py --checkpoint_path "$out/sft" --output_dir "$out/rm" --seed "$seed" \
        --train_file "$out/pairs.jsonl" --eval_file "$out/heldout_pairs.jsonl" \
        --eval_steps 20 --batch_size 32 --num_epochs 2 --learning_rate 3e-4 --lr_schedule cosine --warmup_ratio 0.1
    clock rm

    step "Best of 8 samples by the reward model"
    reward sft sft.best --best_of_n
    mv "$out/samples/sft.best.scored.jsonl" "$out/samples/sft.scored.jsonl"
    "$python" scripts/toy.py --output_dir "$out" --score "$out/samples/sft.best.jsonl"
    clock best

    step "DPO on the same pairs"
    "$python" training/train_dpo.py --checkpoint_path "$out/sft" --output_dir "$out/dpo" --seed "$seed" \
        --train_file "$out/pairs.jsonl" --eval_file "$out/heldout_pairs.jsonl" \
        --eval_steps 20 --beta 1 --batch_size 32 --num_epochs 2 --learning_rate 2e-5 --warmup_ratio 0.1
    measure dpo
    reward dpo dpo.scored
    clock dpo

    step "PPO with the reward model"
    "$python" training/train_ppo.py --checkpoint_path "$out/sft" --output_dir "$out/ppo" --seed "$seed" \
        --prompt_file "$out/prompts.jsonl" --eval_prompt_file "$out/heldout.jsonl" \
        --reward_checkpoint_path "$out/rm" --normalize_reward --kl_coef 0.2 --whiten_rewards \
        --eval_steps 10 --total_steps 40 --rollout_batch_size 128 --ppo_epochs 2 --max_new_tokens 48 \
        --learning_rate 5e-5 --value_learning_rate 1e-4
    measure ppo
    reward ppo ppo.scored
    clock ppo

    step "GRPO with a checked reward"
    "$python" training/train_grpo.py --checkpoint_path "$out/sft" --output_dir "$out/grpo" --seed "$seed" \
        --prompt_file "$out/prompts.jsonl" --eval_prompt_file "$out/heldout.jsonl" \
        --reward_fn scripts/toy.py:correct --eval_steps 10 --total_steps 40 --rollout_batch_size 128 \
        --num_generations 8 --max_new_tokens 48 --learning_rate 2e-4
    measure grpo
    reward grpo grpo.scored
    clock grpo
done

step "Report"
worlds=()
for seed in "${seeds[@]}"; do worlds+=("$(folder "$seed")"); done
out=${worlds[0]}
"$python" scripts/plot_metrics.py "$out/sft" "$out/rm" "$out/dpo" "$out/ppo" "$out/grpo" \
    --output_file "$out/curves.png" \
    --metrics loss eval_loss eval_accuracy rewards/margins objective/scores objective/kl reward eval_pass@1
"$python" scripts/toy_report.py "${worlds[@]}" --output_file "$out/REPORT.md" --picture curves.png
step "Done"
echo "Try it: $python inference/generate.py --checkpoint_path $out/ppo --temperature 0 --prompt \$'7+5+9+4\\n'"
