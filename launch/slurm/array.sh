#!/usr/bin/env bash
# One run for each seed (or fold), each on one GPU. Submit from the project's folder: sbatch launch/slurm/array.sh
#SBATCH --job-name=seeds
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%A-%a.log
##SBATCH --partition=NAME
##SBATCH --account=NAME

trap asked=yes USR1 TERM                           # a request to stop that comes before run.sh listens
config=configs/ham10000.yaml                       # settings of the runs
run=runs/ham10000-seed$SLURM_ARRAY_TASK_ID         # a folder for each run
processes=1                                        # on each node
arguments=(--config "$config" --run.seed "$SLURM_ARRAY_TASK_ID")
# For folds: pack each with `python -m shards pack PATH/TO/HAM10000 data/fold$K --folds 5 --fold $K`, then
# run=runs/ham10000-fold$SLURM_ARRAY_TASK_ID
# arguments=(--config "$config" --data.path "data/fold$SLURM_ARRAY_TASK_ID")

# source venv/bin/activate      # where python and accelerate are installed
# In a container: --container-image=IMAGE (pyxis) at the srun of run.sh, or `apptainer exec --nv IMAGE` after its exec. The
# node itself needs a python, too.
source launch/slurm/run.sh
