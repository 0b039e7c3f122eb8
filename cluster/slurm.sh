#!/usr/bin/env bash
# A study under Slurm: a Ray cluster over the nodes of one allocation, the driver on the first of them. Submit from the checkout:
#   sbatch cluster/slurm.sh tune_spaces/paper/table2.yaml /shared/runs
# The checkout (with its .venv) and the storage lie on the shared file system. With more than one node the study needs tracking.uri.
# Requeued or submitted again it resumes. Exit code 3 (incomplete) asks for that, 2 (refused) does not gain by it.
# Checked as a file by tests/docs/test_cluster_files.py; never run under Slurm by the tests.
#SBATCH --job-name=decay
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

study=${1:?usage: sbatch cluster/slurm.sh STUDY_FILE STORAGE}
storage=${2:?usage: sbatch cluster/slurm.sh STUDY_FILE STORAGE}
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
source .venv/bin/activate

# A token of its own for each allocation: other users of these nodes must not run code on this cluster.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head_ip:$port"
cpus=$SLURM_CPUS_PER_TASK gpus=${SLURM_GPUS_ON_NODE:-0}

srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[0]}" \
    env -u RAY_ADDRESS ray start --head --block --node-ip-address "$head_ip" --port "$port" --num-cpus "$cpus" --num-gpus "$gpus" \
    --dashboard-host 127.0.0.1 &
until ray status > /dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        ray start --address "$RAY_ADDRESS" --block --num-cpus "$cpus" --num-gpus "$gpus" &
done
until [ "$(ray status | grep -c " node_")" -ge "${#nodes[@]}" ]; do sleep 5; done

decay run "$study" --storage "$storage"
