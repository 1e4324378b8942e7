# Sourced by the job scripts: start one launcher on each node, pass requests to stop on, and requeue what is not done.
#
# In: run (the run folder), processes (on each node), arguments, and program (launch/train.py if none is named). What
# stays true: a job whose nodes another one needs is requeued, however far it got; one whose time is over is requeued if it
# got further than it was; one that failed, was cancelled, or was stopped by hand ends.
#
# shellcheck shell=bash disable=SC2154,SC2016  # the job scripts set them; words in single quotes are for the nodes' shells
set -uo pipefail

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

asked=${asked:-no}
ask_to_stop() {
  say "asked to stop: the run will save and end"
  asked=yes
  mkdir -p "$run" && touch "$run/stop"
}
trap ask_to_stop USR1 TERM
JOB_BEGAN=$(date +%s) # a stop file from now on is for this job, even if it is there before its processes are
export JOB_BEGAN
[ "$asked" = yes ] && ask_to_stop # while the job script got here

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
many=""
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  many="--multi_gpu --rdzv_conf timeout=300,read_timeout=300" # seconds that nodes wait for each other
elif [ "$processes" -gt 1 ]; then
  many="--multi_gpu --max_restarts 3" # a process that dies: all start again, from the latest checkpoint
fi
program=${program:-launch/train.py}
code=0

# When the run last wrote its state; "status step samples_seen reason" of it.
written() { stat -c '%i %y' "$run/state.json" 2>/dev/null; }
state() {
  python -c 'import json, sys
try:
    state = json.load(open(sys.argv[1] + "/state.json"))
except (OSError, ValueError):
    state = {}
print(state.get("status", "none"), state.get("step", 0), state.get("samples_seen", 0), state.get("reason", "none").split()[0])' "$run"
}

said_before=$(written)
read -r _ step_before samples_before _ <<<"$(state)"
say "$SLURM_JOB_NUM_NODES node(s), $processes process(es) on each, restart ${SLURM_RESTART_COUNT:-0}, run $run at step $step_before"

# One launcher a node; when one fails, srun ends the others. In the background, so that a signal is noticed at once.
# srun does not take over the job's --cpus-per-task by itself: without it, a step would have one core.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
  exec accelerate launch $0 --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * $1))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$2" --main_process_port "$3" --mixed_precision no --dynamo_backend no \
    "${@:4}"' "$many" "$processes" "$host" "$port" "$program" "${arguments[@]}" --run.folder "$run" &
launched=$!
while kill -0 $launched 2>/dev/null; do
  wait $launched # a trap ends it early
  code=$?
done
[ "$program" = launch/doctor.py ] && exit "$code" # it looks at the nodes, and there is no run

read -r status step samples reason <<<"$(state)"
[ "$status" != finished ] && [ "$(written)" = "$said_before" ] && status=silent # the state is that of the job before
say "the run is $status at step $step"
[ "$status" = finished ] && exit 0
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the last task's own number is that of the whole array
fi
found=$(scontrol show job -o "$job")
if [[ $found != *" JobState=RUNNING "* ]]; then # after scancel it is COMPLETING here
  say "cancelled: not requeued. The same command continues"
  exit 0
fi
if [[ $found == *" PreemptTime=2"* ]]; then # a year, not None: the run may have been ended before it could say anything
  say "preempted: requeued, to go on from step $step"
  exec scontrol requeue "$job"
fi
case $status in
  stopped)
    if [ "$reason" = file ] && [ "$asked" = no ]; then
      say "somebody touched $run/stop: not requeued"
      exit 0
    fi
    if [ "$step" = "$step_before" ] && [ "$samples" = "$samples_before" ]; then
      say "it got no further than before: not requeued. Give the job more time, or lower run.sync_every"
      exit 1
    fi
    say "requeued, to go on from step $step"
    scontrol requeue "$job"
    ;;
  failed)
    say "not requeued; see $run/state.json and $run/errors"
    exit 1
    ;;
  *)
    say "the processes ended without a word in $run (an error above, killed, or out of memory): not requeued. The same command continues"
    exit 1
    ;;
esac
