#!/usr/bin/env bash
# A leak study, one run a task, each on one GPU. Submit from the project's folder: sbatch launch/slurm/leak_study.sh
# When all tasks are done, the same arguments without --task print and draw what was found.
#SBATCH --job-name=leak_study
#SBATCH --array=0-9
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%A-%a.log
##SBATCH --partition=NAME
##SBATCH --account=NAME

asked=no
trap 'asked=yes; kill -USR1 "${study:-}" 2>/dev/null' USR1 TERM # the time is nearly over: the study saves and ends
# 5 arms with 2 seeds are 10 tasks: --array=0-9
arguments=(PATH/TO/HAM10000 --merge-duplicates PATH/TO/audit.csv --seeds 2 --out runs/leak_study)

# source venv/bin/activate      # where python and accelerate are installed
python launch/leak_study.py "${arguments[@]}" --task "$SLURM_ARRAY_TASK_ID" &
study=$!
wait $study
code=$?
while kill -0 $study 2>/dev/null; do # a trap ended the wait early
  wait $study
  code=$?
done
if [ "$code" = 75 ] && [ $asked = yes ]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  if [[ $(scontrol show job -o "$job") != *" JobState=RUNNING "* ]]; then # after scancel it is COMPLETING here
    echo "$(date '+%F %T') cancelled: not requeued. The same command goes on"
    exit 0
  fi
  echo "$(date '+%F %T') requeued, to go on where it is"
  exec scontrol requeue "$job"
fi
exit "$code"
