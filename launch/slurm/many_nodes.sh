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

trap asked=yes USR1 TERM        # a request to stop that comes before run.sh listens
config=configs/ham10000_8gpu.yaml        # settings of the run: batches of 512 over all GPUs together, here 32 images on each
run=runs/ham10000-many          # its folder, on a disk that all nodes see
processes=8                     # on each node: one for each GPU (as --gpus-per-node)
arguments=(--config "$config")  # another batch wants another rate: --data.global_batch_size 1024 --optim.lr 1.2e-3

# export NCCL_SOCKET_IFNAME=ib0 # only where NCCL picks a network that does not reach the other nodes ("connection refused")
# export NCCL_DEBUG=INFO        # what NCCL chose, for the cluster's support
# source venv/bin/activate      # where python and accelerate are installed
# In a container: --container-image=IMAGE (pyxis) at the srun of run.sh, or `apptainer exec --nv IMAGE` after its exec. The
# node itself needs a python, too.
source launch/slurm/run.sh
