#!/usr/bin/env bash
# A Ray cluster on the nodes of a Slurm job, and on it a run, or what of it is left; from the repository, set up, on a shared disk:
#   sbatch --nodes 4 --gpus-per-node 8 cluster/slurm.sh --config my.yaml run=/shared/runs/first
#   sbatch --nodes 4 --gpus-per-node 8 --time 1-0 --export ALL,JOB=compare cluster/slurm.sh --config configs/evidence_gpu.yaml
# A job that Slurm ends early (time, preemption) is queued again and goes on where it was.
#SBATCH --job-name=montessori
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
. .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):${RAY_PORT:-6379}
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds for all nodes to come up; they boot one by one on a busy disk
# Ray's own command for such jobs: the same line on every node; the first one starts the head and runs the job.
exec srun --kill-on-bad-exit ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- \
  python "jobs/${JOB:-full_loop}.py" "$@" cluster.address=auto
