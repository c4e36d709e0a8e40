#!/bin/bash
# One run on several nodes, for as long as it takes:
#     sbatch examples/slurm.sh --config-file configs/coco/sim_R50_bs16_50ep.yaml OUTPUT_DIR /shared/run
# OUTPUT_DIR lies on a disk that all nodes share. Three minutes before the time is up all processes get SIGTERM and
# leave a checkpoint; the job is queued again and goes on from there, as it does when a node fails.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=tcp://$first:$((20000 + SLURM_JOB_ID % 10000))
srun bash -c 'exec sim-m2f train --resume --max-restarts 3 --num-gpus "$SLURM_GPUS_ON_NODE" \
    --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" --dist-url "$0" "$@"' "$address" "$@"
status=$?
if [ "$status" -eq 143 ]; then # 128 + SIGTERM
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
