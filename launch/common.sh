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
  RUN_DIR=${RUN_DIR:-$RUNS/$NAME}
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

no_options() { # no_options WHY
  ((!${#OPTIONS[@]})) || fail "${OPTIONS[0]}: $1"
}

# --- on the login node ---------------------------------------------------------------------------------------------

submit() {
  local words said placeholders=()
  for said in SBATCH_ACCOUNT SBATCH_PARTITION; do # which sbatch itself reads
    if [[ ${!said-} == CHANGE_ME ]]; then
      [[ $IS_EXAMPLE ]] || fail "$said is not set: set it in $SITE (empty: the site's default)"
      placeholders+=("$said=${!said}")
    fi
    [[ ${!said-} ]] || unset "$said"
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
    show "${placeholders[@]}" sbatch "${words[@]}"
    show "${START[@]}" "${COMMAND[@]}" "${ARGS[@]}"
  fi
  check_folders
  [[ ${CHECK:-} == no ]] || check
  if [[ ! $DRY_RUN ]]; then
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
    said=$(sbatch --test-only "${words[@]}" 2>&1) || fail "sbatch refuses: ${said##*$'\n'}"
    echo "$said"
  fi
}

hand_in() { # hand_in WORDS: to sbatch; sets ID, which is the job's whatever sbatch is told to print
  local said line
  ID=''
  said=$(sbatch --parsable "$@" 2>&1) || fail "sbatch refuses: ${said##*$'\n'}"
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
  [[ $DRY_RUN ]] || mkdir -p "$log" "$RUN_DIR"
}

can_make() {
  local path=$1
  until [[ -e $path ]]; do path=$(dirname "$path"); done
  [[ -d $path && -w $path ]]
}

check() { # names, values, files and layout, before a node is asked for
  local python=$PYTHON files=(--check-files) mount
  if [[ $IMAGE ]]; then # its Python is not here
    python=$CHECK_PYTHON
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
  "$python" -m megatron_fc topology "${ARGS[@]}" --nodes "$(option nodes)" --gpus-per-node "$(option ntasks-per-node)" "${files[@]}"
}

# --- in the job ----------------------------------------------------------------------------------------------------

job() {
  say "job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, run_dir=$RUN_DIR"
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # below the ports that outgoing connections take
  compare_job
  attempt && exit 0
  trap '' USR1 TERM # requeueing sends TERM
  local restarts said
  restarts=$(shown Restarts) || true
  if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
    say "SLURM itself requeues this job"
    exit 0
  fi
  if [[ $SIGNAL == TERM ]]; then
    say "cancelled, not requeued; where SLURM itself requeues, after a preemption, it does that now"
    exit 143
  fi
  if said=$(scontrol requeue "$JOB" 2>&1) || [[ $said == *pending* ]]; then # SLURM may have been faster
    say "requeued"
    exit 0
  fi
  say "SLURM does not requeue this job ($said): submit the same command again"
  [[ $SIGNAL ]] || exit 75
}

compare_job() { # ranks, GPUs and the layout that was checked; what differs would train on other ranks than it seems
  local nodes=${SLURM_NNODES:-1} tasks=${SLURM_NTASKS_PER_NODE:-}
  [[ $tasks ]] || fail "sbatch was given no --ntasks-per-node: give it, and as many --gpus-per-node"
  [[ ! $CHECKED || $CHECKED == "${nodes}x$tasks" ]] ||
    fail "SLURM gives $nodes nodes x $tasks tasks, and $CHECKED were checked: submit again with --nodes=$nodes" \
      "--ntasks-per-node=$tasks, or find out what changes these"
  [[ ${SLURM_NTASKS:-} == $((nodes * tasks)) ]] ||
    fail "SLURM gives ${SLURM_NTASKS:-no} tasks for $nodes nodes x $tasks tasks: give --nodes and --ntasks-per-node," \
      "and no --ntasks"
  export TASKS_PER_NODE=$tasks
}

compare() { # in every task: its node has that many tasks, each with a GPU; the first task says where it is
  trap '' USR1 TERM
  local tasks=${SLURM_STEP_TASKS_PER_NODE%%(*} gpus=${SLURM_GPUS_ON_NODE:-0}
  if [[ $tasks != "$TASKS_PER_NODE" ]] || ((gpus && gpus != tasks)); then
    ((SLURM_LOCALID)) || echo "launch: $SLURMD_NODENAME has $gpus GPUs for tasks: $SLURM_STEP_TASKS_PER_NODE; every" \
      "GPU has a task: give --ntasks-per-node=G --gpus-per-node=G, and no other option for tasks or GPUs" >&2
    exit 2
  fi
  ((SLURM_PROCID)) || echo "$SLURMD_NODENAME"
}

roll_call() { # sets CODE and MASTER_ADDR, which need not be the first node of the list
  local output
  output=$(mktemp)
  exec {ANSWERS}>"$output"
  SLURM_KILL_BAD_EXIT=1 follow "${ROLL_CALL[@]}"
  exec {ANSWERS}>&-
  ANSWERS=1
  MASTER_ADDR=$(cat "$output")
  rm "$output"
  export MASTER_ADDR
  [[ $CODE != 2 ]] || exit 2
}

attempt() { # returns 0 at the target, 1 if the run is to go on; exits if it cannot
  CODE=0 STEP=''
  mkdir -p "$RUN_DIR"
  claim "job ${JOB:-of $HOSTNAME, process $$}"
  refuse_second
  [[ ! $JOB ]] || echo "$JOB" >"$RUN_DIR/job"
  release
  case $(state) in
    done) say "the target is reached already; to train on, remove $RUN_DIR/state"; return 0 ;;
    stuck) say "stopped earlier as stuck; to try again, remove $RUN_DIR/state and $RUN_DIR/launches"; exit 3 ;;
  esac
  guard
  # After a start that ended with 16, Megatron wants the same step on another GPU.
  export SHIFT
  SHIFT=$(cat "$RUN_DIR/shift" 2>/dev/null || echo 0)
  trap 'pass_on USR1' USR1
  trap 'pass_on TERM' TERM
  [[ $SIGNAL || ! ${ROLL_CALL[*]} ]] || roll_call
  [[ $CODE != 0 || $SIGNAL ]] || step preflight
  [[ $CODE != 0 || $SIGNAL ]] || step "${COMMAND[@]}"
  if [[ $CODE == 16 ]]; then echo $((SHIFT + 1)) >"$RUN_DIR/shift"; else rm -f "$RUN_DIR/shift"; fi
  # Before a preemption SLURM sends TERM to the ranks alone, which save and end.
  if [[ $CODE:$SIGNAL == 0: && $(tail -n1 "$RUN_DIR/starts.jsonl" 2>/dev/null) == *'"reason": "signal TERM"'* ]]; then preempted; fi
  case $CODE:$(state) in
    0:done) say "the target is reached"; return 0 ;;
    2:*) stuck "the input is wrong, or a checkpoint cannot be read or written (exit code 2)" ;;
    17:*) stuck "a loss was NaN or infinite (exit code 17), the end of $RUN_DIR/starts.jsonl says where" ;;
  esac
  say "ended with code $CODE${SIGNAL:+ after $SIGNAL}, not at the target"
  return 1
}

state() { cat "$RUN_DIR/state" 2>/dev/null || true; } # done, continue or stuck

claim() { # claim OWNER: nobody else looks whose run_dir is and writes it down, until `release`
  local tries
  for ((tries = 0; ; tries++)); do
    # A link is made in one piece also on network file systems.
    ln -s "$1" "$RUN_DIR/job.lock" 2>/dev/null && break
    [[ -L $RUN_DIR/job.lock ]] || ((tries < 3)) || fail "run_dir=$RUN_DIR cannot be written: choose another"
    ((tries < 60)) || fail "$RUN_DIR/job.lock has been held for a minute by $(readlink "$RUN_DIR/job.lock"): where" \
      "that has ended, remove it"
    sleep 1
  done
  trap release EXIT
}

release() { rm -f "$RUN_DIR/job.lock" && trap - EXIT; }

refuse_second() { # two jobs would write into the same folder
  local other
  other=$(cat "$RUN_DIR/job" 2>/dev/null) || return 0
  [[ $other == "$JOB" || ! $(squeue -h -j "$other" -t PENDING,RUNNING,SUSPENDED 2>/dev/null) ]] ||
    fail "job $other has run_dir=$RUN_DIR: scancel $other, wait for it, or choose another run_dir"
}

guard() { # stop when the last starts all began where this one would begin
  local from
  from=$(cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0)
  echo "$from" >>"$RUN_DIR/launches"
  (($(uniq -c "$RUN_DIR/launches" | tail -n1 | awk '{print $1}') <= MAX_STARTS)) ||
    stuck "the last $MAX_STARTS starts began at iteration $from and left no newer checkpoint"
}

stuck() {
  echo stuck >"$RUN_DIR/state" || true # the disk may be full
  say "stuck: $1; see above and $RUN_DIR/logs, and start again when it is repaired"
  exit 3
}

step() { # step COMMAND ...: one task per GPU; sets CODE
  # That a rank of a training ends is a matter of the others; of any other command it ends all.
  local -x SLURM_KILL_BAD_EXIT=0 IGNORED="USR1 TERM"
  [[ $1 == train || $1 == traffic ]] || SLURM_KILL_BAD_EXIT=1 IGNORED=USR1
  follow "${START[@]}" "$@" "${ARGS[@]}"
}

follow() { # follow COMMAND ...: through signals, to its end; sets CODE, among its ranks' the one that decides
  local pipe reader decided
  pipe=$(mktemp -u)
  mkfifo "$pipe"
  decide <"$pipe" &
  reader=$!
  "$@" >&"${ANSWERS:-1}" 2>"$pipe" &
  STEP=$!
  while # a trap interrupts wait
    wait "$STEP" && CODE=0 || CODE=$?
    kill -0 "$STEP" 2>/dev/null
  do :; done
  STEP=''
  rm "$pipe"
  while # as above
    wait "$reader" && decided=0 || decided=$?
    kill -0 "$reader" 2>/dev/null
  do :; done
  [[ $decided == 0 ]] || CODE=$decided
}

decide() { # hands on what srun and the ranks say; returns the code that decides, if a rank ended with one, else 0
  # srun itself returns the highest signal or code: of a rank that it had to kill, or that was lost after the other one.
  trap '' USR1 TERM
  local line code=0
  while IFS= read -r line; do
    printf '%s\n' "$line" >&2
    [[ $line =~ ^srun:\ error:.*\ Exited\ with\ exit\ code\ (2|16|17)$ ]] || continue
    case $code:${BASH_REMATCH[1]} in 17:* | 2:16) ;; *) code=${BASH_REMATCH[1]} ;; esac
  done
  return "$code"
}

preempted() { echo preempted >>"$RUN_DIR/launches"; } # such a start has not failed

pass_on() { # the ranks save and end; those that do not listen yet are told again, those that never do are ended
  say "got $1: the ranks save and end"
  SIGNAL=$1
  [[ $SIGNAL != TERM ]] || preempted # or cancelled
  [[ $STEP ]] || return 0
  local said=USR1 last_call=$((SECONDS + $(time_left) - 60))
  while kill -"$said" "$STEP" 2>/dev/null; do # srun ends the ranks at TERM
    sleep 20
    ((SECONDS < last_call)) || { [[ $said == TERM ]] && said=KILL || said=TERM; }
  done &
}

shown() { # shown FIELD: what SLURM says of this job
  scontrol show job "${JOB:-none}" 2>/dev/null | sed -n "s/^\(.* \)\{0,1\}$1=\([^ ]*\).*/\2/p"
}

time_left() { # seconds to the job's time limit, or else a year
  local end
  end=$(shown EndTime)
  if [[ $end == [0-9]* ]]; then echo $(($(date -d "$end" +%s) - $(date +%s))); else echo 31536000; fi
}
