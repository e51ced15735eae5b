#!/usr/bin/env bash
# Fine-tuning on several nodes of 8 GPUs under Slurm; continues by itself after a time limit, preemption or lost node.
#     sbatch --nodes 2 scripts/recipes/slurm.sh MODEL TRAIN_FILE OUT
# The repository, MODEL, TRAIN_FILE and OUT must be on a file system that all nodes share; the run checks this for OUT.
# 5 minutes before the time limit the processes get SIGTERM, upon which the run saves a checkpoint and ends. A step and
# a save must fit into KillWait of slurm.conf (30 s by default, after a preemption or scancel), and into the 4 minutes
# that torchrun waits for its ranks (--shutdown-timeout needs torch 2.13; leave it out before).
# Expected: not yet run on a cluster.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
model=${1:?MODEL is missing} train=${2:?TRAIN_FILE is missing} out=${3:?OUT is missing} python=${PYTHON:-.venv/bin/python}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

mkdir -p "$(dirname "$out")" && touch "${out%/}.begun"
srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --shutdown-timeout 240 \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" training/finetune_sft.py --resume --output_dir "$out" \
    --checkpoint_path "$model" --train_file "$train" --dp_replicate "$SLURM_NNODES" --max_seq_len 4096 --pack \
    --batch_size 128 --micro_batch_size 1 --activation_checkpointing selective --learning_rate 1e-5 ${MORE:-}

case " ${MORE:-} " in *" --no-merge "*) exports=adapter_config.json ;; *) exports="config.json merged/config.json" ;; esac
for export in $exports; do # the last file of a model, of LoRA's, of adapters alone; written now: the run has finished
    [ "$out/$export" -nt "${out%/}.begun" ] && exit 0
done
[ "$SECONDS" -gt 600 ] || exit 1                 # failed early: a mistake, which a restart would repeat
scontrol requeue "$SLURM_JOB_ID"
