#!/usr/bin/env bash
# A Ray cluster on the nodes of a Slurm job, and on it a run, or what of it is left; from the repository on a shared
# disk, after `make setup LOCK=cuda` there; models of the Hub are looked for in HF_HOME, a folder that all nodes see:
#   sbatch --nodes 2 --gpus-per-node 4 cluster/slurm.sh --config my.yaml run=/shared/runs/first
#   sbatch --nodes 1 --gpus-per-node 1 --time 1-0 --export ALL,JOB=compare cluster/slurm.sh --config configs/evidence_gpu.yaml
#   sbatch --nodes 2 --gpus-per-node 4 --export ALL,JOB=score_files cluster/slurm.sh --student /models/mine --warm-up /shared/warm_up.jsonl \
#     --examples /shared/candidates.jsonl --reference /shared/reference.jsonl --output /shared/scores \
#     groups=8 worker.cpus=4 worker.gpus=1 warm_up.worker.gpus=1
# A job that is preempted, loses a node or reaches its time limit is queued again and goes on where it was.
#SBATCH --job-name=montessori
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
. .venv/bin/activate
if [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] && python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)'; then
  echo "the packages in .venv are those for CPUs: make setup LOCK=cuda" >&2; exit 1
fi
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1 # two minutes before the time is up

# Only who has this token, in the home that all nodes share, can use the cluster.
ray get-auth-token --generate >/dev/null
export RAY_AUTH_MODE=token

# This script runs on the first node. Many machines call themselves 127.0.1.1, where no other finds them.
address=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ { print $1; exit }' || true)
address=${address:-$(hostname -I | awk '{ print $1 }')}
[ -n "$address" ] || { echo "$(hostname) has no address that other nodes could reach" >&2; exit 1; }

# Ray's own command for such jobs: the same line on every node; the first one starts the head and runs the job.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds for all nodes to come up
srun --kill-on-bad-exit --cpu-bind=none ray symmetric-run --address "$address:${RAY_PORT:-6379}" \
  --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- \
  python "jobs/${JOB:-full_loop}.py" "$@" cluster.address=auto &
wait $!
