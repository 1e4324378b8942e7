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

config=configs/ham10000.yaml    # settings of the run
run=runs/ham10000               # its folder, on a disk that all nodes see
processes=1                     # on each node: one for each GPU (as --gpus-per-node)
arguments=(--config "$config")  # and single settings, as --data.batch_size 256

# source venv/bin/activate      # or run the job in a container: srun --container-image=... (pyxis), apptainer exec ...
source launch/slurm/run.sh
