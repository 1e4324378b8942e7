#!/usr/bin/env bash
# Pack a data set on several nodes, to a shared folder or a bucket. Submit from the project's folder: sbatch launch/slurm/pack.sh
# If the time runs out, or a task fails, submit it again: what is packed is kept, if --nodes and the arguments stay the same.
#SBATCH --job-name=pack
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
##SBATCH --partition=NAME
##SBATCH --account=NAME

arguments=(PATH/TO/HAM10000 data/ham10000) # as after `python -m shards pack`; both may be URLs: s3://bucket/source s3://bucket/set

# source venv/bin/activate      # where python is installed
# srun does not take over the job's --cpus-per-task by itself. A task that fails does not end the others: they finish their shares.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 python -m shards pack "${arguments[@]}"
