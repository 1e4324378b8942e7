#!/usr/bin/env bash
# Train on the GPUs of one node. Submit from the project's folder: sbatch launch/slurm/one_node.sh
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
##SBATCH --partition=NAME
##SBATCH --account=NAME

trap asked=yes USR1 TERM        # a request to stop that comes before run.sh listens
config=configs/ham10000.yaml    # settings of the run
run=runs/ham10000               # its folder, on a disk that all nodes see
processes=1                     # on each node: one for each GPU (as --gpus-per-node)
arguments=(--config "$config")  # and single settings, as --run.epochs 60. For 8 GPUs: config=configs/ham10000_8gpu.yaml

# source venv/bin/activate      # where python and accelerate are installed
# In a container: --container-image=IMAGE (pyxis) at the srun of run.sh, or `apptainer exec --nv IMAGE` after its exec. The
# node itself needs a python, too.
source launch/slurm/run.sh
