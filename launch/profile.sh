#!/bin/bash
#SBATCH --job-name=profile
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

# How many bytes a training step moves, through the memory of the devices and over the network, with Frac-Connections
# and with plain residuals. Run it in the repository's folder:
#
#   launch/profile.sh configs/olmoe_7b.yaml --dry-run --nodes=8          show what would be submitted, and check it
#   launch/profile.sh configs/olmoe_7b.yaml --nodes=8                    check and submit
#   launch/profile.sh CONFIG.yaml [from_step=K] [steps=N] [twin=no] [--nodes=8 ...] [key=value ...]
#
# The run trains from its beginning, counts on the steps K .. K+N-1 (3 and 4) and stops; the residual twin of the config
# goes first, twin=no leaves it out. Reports: run_dir/traffic.html, .md and .json, the twin's in run_dir/residual. If a
# rank is lost, or the time is nearly over, the report is made of what the ranks have left until then.

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[[ -e launch/common.sh ]] || { echo "launch: submit from the repository's folder, not from $PWD" >&2; exit 2; }

CONFIG=${1:-}
NAME=profile-$(basename "$CONFIG" .yaml)
source launch/common.sh
OVERRIDES=(save_interval=null) # it writes no checkpoint, and needs no room for one
[[ -e $CONFIG ]] || fail "'$CONFIG' is no file: launch/profile.sh CONFIG.yaml [from_step=K] [steps=N] [key=value ...]"

FROM_STEP='' STEPS='' TWIN=yes
own_words 'from_step steps twin' "${@:2}"
VARIANT=("$CONFIG" "${OWN[@]}")
[[ $TWIN =~ ^(yes|no)$ ]] || fail "twin=$TWIN: give yes or no"
COMMAND=(traffic run ${FROM_STEP:+--from-step "$FROM_STEP"} ${STEPS:+--steps "$STEPS"})

attempt() { # in place of a training's: each run once, and a report in any case
  CODE=0 STEP=''
  local run_dir=$RUN_DIR twin=$RUN_DIR/residual
  trap 'cut USR1' USR1 TERM # what the ranks have left lies on the disk
  [[ ! $SIGNAL ]] || { say "the time limit is near before anything is counted: give more --time"; exit 75; }
  roll_call
  [[ $CODE != 0 ]] || step preflight
  [[ $CODE == 0 ]] || exit "$CODE"
  if [[ $TWIN == yes ]]; then
    ARGS+=(connection=residual "run_dir=$twin")
    counted "$twin"
    ARGS=("${ARGS[@]:0:${#ARGS[@]}-2}")
    COMMAND+=(--against "$twin")
  fi
  counted "$run_dir"
  exit 0
}

counted() { # counted FOLDER: profile; after a failure make the report of the parts in the folder, and end
  step "${COMMAND[@]}"
  [[ $CODE != 0 ]] || return 0
  say "the run ended with code $CODE${SIGNAL:+ after $SIGNAL}; the report is made of the parts that are there"
  "${START[0]}" --overlap --nodes=1 --ntasks=1 "${START[@]:1}" traffic merge "$1" || true
  exit "$CODE"
}

launch "${REST[@]}"
