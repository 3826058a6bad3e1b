# What the launch scripts share. They set NAME and CONFIG, source this file, add to OVERRIDES, perhaps set VARIANT (words
# of their own) and COMMAND, and call `launch`.
# shellcheck shell=bash
#
# A script runs twice. On the login node it checks everything and hands itself to sbatch (`submit`). In the job it makes
# an `attempt`, pre-flight checks and training, and has itself requeued if that has not reached the target (`job`).
#
# Exit codes: 0 done, requeued, or saved before the time limit where SLURM does not requeue (a chain's next job goes on);
# 2 wrong input; 3 stuck, a human must look; 75 ended early, submit it again; 143 cancelled.

set -euo pipefail

COMMAND=(train)
# Every run has three checkpoints to fall back on.
OVERRIDES=(on_damage=previous keep_last=3)
# The site file sets these; launch/site.example.sh describes them.
SITE=${SITE:-launch/site.sh}
RUNS=runs PYTHON=python IMAGE='' MOUNTS='' CHECK_PYTHON=.venv/bin/python SITE_OVERRIDES=()
# A run that has started this often from the same checkpoint does not start again; preempted starts do not count.
MAX_STARTS=3
# Seconds after which srun kills the ranks that still run when one has ended, e.g. one that hangs.
WAIT=60

# The signal that this job got. One that comes before `attempt` listens, as in a start shorter than its notice, is kept:
# bash would end, and the job fail.
SIGNAL=''
[[ ! ${SLURM_JOB_ID:-} ]] || trap 'SIGNAL=USR1' USR1

# The job as SLURM's commands name it: of an array this element alone.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-${SLURM_JOB_ID:-}}

# What a task does: its rank comes from SLURM. With SHIFT=1 each rank of a node computes on its neighbour's GPU.
# A signal would kill a Python that has not yet set up its handlers; one that saves nothing may be ended by TERM.
# shellcheck disable=SC2016  # expanded in the task
TASK='trap "" ${IGNORED:-USR1 TERM}; export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$(((SLURM_LOCALID + SHIFT) % SLURM_NTASKS_PER_NODE)); exec "$@"'
# The first step of all tasks, where they come from SLURM.
ROLL_CALL=()

say() { echo "$(date +'%F %T') launch: $*"; }
fail() { echo "launch: $*" >&2; exit 2; }

# shellcheck source=launch/words.sh
source launch/words.sh
# shellcheck source=launch/job.sh
source launch/job.sh

launch() {
  prepare "$@"
  ROLL_CALL=(srun bash -c "$(declare -f compare); compare" task)
  START=(srun --label --wait="$WAIT" --cpus-per-task="${SLURM_CPUS_PER_TASK:-$(option cpus-per-task)}")
  if [[ $IMAGE ]]; then
    START+=(--container-image="$IMAGE" ${MOUNTS:+--container-mounts="$MOUNTS"} --container-workdir="$PWD")
  fi
  START+=(bash -c "$TASK" task "$PYTHON" -m megatron_fc)
  if [[ ! ${SLURM_JOB_ID:-} ]]; then
    submit
  else
    [[ ! $DRY_RUN ]] || OPTIONS=(--dry-run "${OPTIONS[@]}")
    no_options "nothing is submitted inside a job: give options to sbatch, before the script, and --dry-run outside"
    job
  fi
}

prepare() { # reads words and site; sets what `read_words` does, RUN_DIR, and ARGS (CONFIG and all overrides)
  read_words "$@"
  read_site
  IS_OWN_RUN_DIR=$RUN_DIR
  RUN_DIR=${RUN_DIR:-$RUNS/$(run_name)}
  ARGS=("$CONFIG" "${OVERRIDES[@]}" "${SITE_OVERRIDES[@]}" "${WORDS[@]}" "run_dir=$RUN_DIR")
}

read_site() { # without a site file, what would be done is shown with the example's placeholders
  : "${USER:=$(id -un)}" # which containers leave unset, and site files use
  IS_EXAMPLE=''
  if [[ ! -e $SITE ]]; then
    [[ $DRY_RUN ]] || fail "$SITE is missing: copy launch/site.example.sh to it and fill it in"
    echo "note: $SITE is missing, so placeholders are shown, and data are not looked for: copy" \
      "launch/site.example.sh to it and fill in SBATCH_ACCOUNT, SBATCH_PARTITION, RUNS, PYTHON or IMAGE, the paths" \
      "in SITE_OVERRIDES and the network" >&2
    SITE=launch/site.example.sh IS_EXAMPLE=yes
  fi
  # shellcheck source=launch/site.example.sh
  source "$SITE"
}

# shellcheck disable=SC2153 # the scripts set NAME
run_name() { # NAME, and behind it connections that are not the script's own: runs of two kinds share no folder
  local own own_rate kind rate label
  read -r own own_rate < <(last_connection "$(setting connection)" "$(setting rate)" "${OVERRIDES[@]}")
  read -r kind rate < <(last_connection "$own" "$own_rate" "${SITE_OVERRIDES[@]}" "${WORDS[@]}")
  label=$kind
  [[ $kind == residual || $rate == "$own_rate" ]] || label+=_x$rate
  if [[ $kind == "$own" && $label == "$kind" || $NAME == *"-$label" ]]; then echo "$NAME"; else echo "$NAME-$label"; fi
}

last_connection() { # last_connection KIND RATE OVERRIDES: these, or what overrides make of them
  local word kind=${1:-dfc} rate=${2:-4} # as `megatron-fc train` has it
  for word in "${@:3}"; do
    case ${word#connections.} in connection=*) kind=${word#*=} ;; rate=*) rate=${word#*=} ;; esac
  done
  echo "$kind" "$rate"
}

no_options() { # no_options WHY
  ((!${#OPTIONS[@]})) || fail "${OPTIONS[0]}: $1"
}

# --- on the login node ------------------------------------------------------------------------------------------------

submit() {
  local words said site=()
  for said in SBATCH_ACCOUNT SBATCH_PARTITION; do # which sbatch itself reads
    if [[ ${!said-} == CHANGE_ME ]]; then
      [[ $IS_EXAMPLE ]] || fail "$said is not set: set it in $SITE (empty: the site's default)"
    fi
    if [[ ${!said-} ]]; then site+=("$said=${!said}"); else unset "$said"; fi
  done
  refuse_options
  [[ $(option nodes) =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$(option nodes): give one number, the layout depends on it"
  [[ $(gpus) == 0 || $(gpus) == "$(option ntasks-per-node)" ]] ||
    fail "--gpus-per-node=$(gpus) and --ntasks-per-node=$(option ntasks-per-node) differ: every GPU has a task, give both"
  [[ ${COMMAND[0]} != train || $(state) != 'done' ]] ||
    fail "the target is reached already; to train on, remove $RUN_DIR/state"
  # A chain's jobs wait for each other.
  [[ $(option dependency) == singleton ]] || refuse_second
  words=(--job-name="$(basename "$RUN_DIR")" "${OPTIONS[@]}" "$0" "${VARIANT[@]}" "${WORDS[@]}" "run_dir=$RUN_DIR"
    "checked=$(option nodes)x$(option ntasks-per-node)")
  if [[ $DRY_RUN ]]; then
    show "${site[@]}" sbatch "${words[@]}"
    show "${START[@]}" "${COMMAND[@]}" "${ARGS[@]}"
    said=$(option output)
    echo "job log    ${said//%x/$(basename "$RUN_DIR")}, time limit $(option time)"
  fi
  check_folders
  [[ ${CHECK:-} == no ]] || check
  if [[ ! $DRY_RUN ]]; then
    make_folders
    [[ $(state) != stuck ]] || rm "$RUN_DIR/state" "$RUN_DIR/launches"
    if [[ $(option dependency) == singleton ]]; then
      hand_in "${words[@]}"
    else
      claim "$HOSTNAME, process $$"
      refuse_second
      hand_in "${words[@]}"
      [[ ! $ID ]] || echo "${ID%%;*}" >"$RUN_DIR/job"
      release
    fi
  elif [[ ! $IS_EXAMPLE ]] && type sbatch >/dev/null 2>&1; then
    test_only "${words[@]}"
  fi
}

test_only() { # test_only WORDS: what SLURM would say; a login node may have sbatch, and a cluster only elsewhere
  local said
  if said=$(sbatch --test-only "$@" 2>&1); then
    echo "$said"
  elif [[ $said =~ "configuration source"|"contact slurm controller" ]]; then
    echo "note: sbatch reaches no cluster here, so SLURM is not asked: ${said##*$'\n'}" >&2
  else
    refused "$said"
  fi
}

refused() { # refused SAID: a run that is not submitted leaves no folder
  if [[ ! $DRY_RUN ]]; then
    [[ $(trap -p EXIT) != *release* ]] || release
    rmdir "$RUN_DIR" 2>/dev/null || true
  fi
  fail "sbatch refuses: ${1##*$'\n'}"
}

hand_in() { # hand_in WORDS: to sbatch; sets ID, which is the job's whatever sbatch is told to print
  local said line
  ID=''
  said=$(sbatch --parsable "$@" 2>&1) || refused "$said"
  while IFS= read -r line; do
    if [[ $line =~ ^[0-9]+(\;.*)?$ ]]; then ID=$line; else echo "$line" >&2; fi
  done <<<"$said"
  if [[ " ${OPTIONS[*]} " == *" --parsable "* ]]; then echo "$ID"; else echo "Submitted batch job ${ID%%;*}"; fi
}

gpus() { # per node; sbatch takes --gpus-per-node=h100:8 as well
  local value
  value=$(option gpus-per-node)
  echo "${value##*:}"
}

check_folders() { # a job whose log cannot be written fails without a word
  local log
  log=$(dirname "$(option output)")
  can_make "$log" || fail "the log folder $log cannot be written: give --output=FILE"
  [[ $IS_EXAMPLE && ! $IS_OWN_RUN_DIR ]] || can_make "$RUN_DIR" ||
    fail "run_dir=$RUN_DIR cannot be written: choose another"
}

make_folders() {
  mkdir -p "$(dirname "$(option output)")" "$RUN_DIR"
}

can_make() {
  local path=$1
  until [[ -e $path ]]; do path=$(dirname "$path"); done
  [[ -d $path && -w $path ]]
}

check() { # names, values, files and layout, before a node is asked for
  local python=$PYTHON files=(--check-files) packages=(--check-packages) mount
  if [[ $IMAGE ]]; then # its Python is not here
    python=$CHECK_PYTHON packages=()
    for mount in ${MOUNTS//,/ }; do
      [[ $mount: == "${mount%%:*}:${mount%%:*}:"* ]] || files=()
    done
  fi
  [[ ! $IS_EXAMPLE ]] || files=()
  if ! "$python" -c 'import megatron_fc' 2>/dev/null; then
    echo "note: $python cannot import megatron_fc here, so config and data are checked in the job only" >&2
    return
  fi
  ((${#files[@]})) || [[ $IS_EXAMPLE ]] ||
    echo "note: MOUNTS gives folders other names, so data are looked for in the job only" >&2
  "$python" -m megatron_fc topology "${ARGS[@]}" --nodes "$(option nodes)" --gpus-per-node "$(option ntasks-per-node)" "${files[@]}" \
    "${packages[@]}"
}
