#!/bin/bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

# Checkpoints of a run on tasks and validation sets, also while the run goes on: of its folder this only reads. Run it in
# the repository's folder:
#
#   launch/evaluate.sh configs/olmoe_7b.yaml of=/scratch/runs/moe7b tasks=configs/eval/olmoe.yaml data=/scratch/eval
#   launch/evaluate.sh CONFIG.yaml of=RUN_DIR tasks=LIST [sets=LIST] [every=N] [data=FOLDER] [again=MINUTES] [--nodes=1 ...]
#
# Evaluated are the checkpoints at multiples of iteration N (1); sets=LIST names validation sets, by=document or by=chunk
# cuts them; limit=N takes so many documents. Results and answers lie in run_dir, by default evaluate-RUN in RUNS. What is
# there is not run again: a job that is killed or reaches its time limit goes on. With again=MINUTES the job starts
# once more when it is through, until the run is done.

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[[ -e launch/common.sh ]] || { echo "launch: submit from the repository's folder, not from $PWD" >&2; exit 2; }

CONFIG=${1:-}
source launch/common.sh
OVERRIDES=(save_interval=null) # it writes no checkpoint, and needs no room for one
[[ -e $CONFIG ]] || fail "'$CONFIG' is no file: launch/evaluate.sh CONFIG.yaml of=RUN_DIR tasks=LIST [key=value ...]"

OF='' TASKS='' SETS='' EVERY=1 BY=chunk AGAIN='' DATA='' LIMIT=''
own_words 'of tasks sets every by again data limit' "${@:2}"
VARIANT=("$CONFIG" "${OWN[@]}")
[[ $OF ]] || fail "of=RUN_DIR is missing: give the folder of the run whose checkpoints are evaluated"
NAME=evaluate-$(basename "$OF")
[[ $TASKS || $SETS ]] || fail "nothing to evaluate: give tasks=LIST, sets=LIST, or both"
[[ $AGAIN =~ ^([1-9][0-9]*)?$ ]] || fail "again=$AGAIN: give a number of minutes"

# What takes several values stands before what takes one.
options=(${DATA:+--data "$DATA"} ${LIMIT:+--limit "$LIMIT"} --every "$EVERY" "$OF/checkpoints")
ON_TASKS=(evaluate --tasks "$TASKS" "${options[@]}")
ON_SETS=(evaluate perplexity --sets "$SETS" --by "$BY" "${options[@]}")
COMMAND=("${ON_TASKS[@]}")
[[ $TASKS ]] || COMMAND=("${ON_SETS[@]}")

attempt() { # in place of a training's
  local of_run
  CODE=0 STEP=''
  trap 'cut USR1' USR1 # what has been answered lies on the disk
  trap 'cut TERM' TERM
  of_run=$(cat "$OF/state" 2>/dev/null || true) # what the run writes from here on is the next job's
  [[ $SIGNAL || ! ${ROLL_CALL[*]} ]] || roll_call
  [[ ! $TASKS || $CODE != 0 || $SIGNAL ]] || step "${ON_TASKS[@]}"
  [[ ! $SETS || $CODE != 0 || $SIGNAL ]] || step "${ON_SETS[@]}"
  [[ ! $SIGNAL ]] || { say "got $SIGNAL, the next start goes on"; return 1; }
  [[ $CODE == 0 ]] || exit "$CODE"
  [[ ! $AGAIN || $of_run == 'done' ]] || later
}

later() { # the same job once more: held until its time is set
  trap '' USR1 TERM # requeueing sends TERM
  scontrol requeuehold "$JOB" || fail "SLURM does not requeue this job: give a partition that does, or no again=$AGAIN"
  scontrol update JobId="$JOB" StartTime="now+${AGAIN}minutes"
  scontrol release "$JOB"
  say "requeued, to start in $AGAIN minutes"
  exit 0
}

launch "${REST[@]}"
