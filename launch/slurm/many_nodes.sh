#!/usr/bin/env bash
# Train on several nodes. Submit from the project's folder: sbatch launch/slurm/many_nodes.sh
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
##SBATCH --partition=NAME
##SBATCH --account=NAME

config=configs/ham10000.yaml    # settings of the run; data.batch_size is that of all GPUs together
run=runs/ham10000-many          # its folder, on a disk that all nodes see
processes=8                     # on each node: one for each GPU (as --gpus-per-node)
arguments=(--config "$config" --data.batch_size 1024)

# export NCCL_SOCKET_IFNAME=ib0 # only where NCCL picks a network that does not reach the other nodes ("connection refused")
# export NCCL_DEBUG=INFO        # what NCCL chose, for the cluster's support
# source venv/bin/activate      # or run the job in a container: srun --container-image=... (pyxis), apptainer exec ...
source launch/slurm/run.sh
