# What the launch scripts do in the job: `attempt`, and what becomes of the job then. launch/common.sh sources it.
# shellcheck shell=bash disable=SC2034,SC2153

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
  # What is wrong is an answer, too: of a task that fails SLURM may lose what it said last.
  trap '' USR1 TERM
  local tasks=${SLURM_STEP_TASKS_PER_NODE%%(*} gpus=${SLURM_GPUS_ON_NODE:-0}
  if [[ $tasks != "$TASKS_PER_NODE" ]] || ((gpus && gpus != tasks)); then
    ((SLURM_LOCALID)) || echo "launch: $SLURMD_NODENAME has $gpus GPUs for tasks: $SLURM_STEP_TASKS_PER_NODE; every" \
      "GPU has a task: give --ntasks-per-node=G --gpus-per-node=G, and no other option for tasks or GPUs"
    return 0
  fi
  ((SLURM_PROCID)) || echo "$SLURMD_NODENAME"
}

roll_call() { # sets CODE and MASTER_ADDR, which need not be the first node of the list
  local output differs
  output=$(mktemp)
  exec {ANSWERS}>"$output"
  SLURM_KILL_BAD_EXIT=1 follow "${ROLL_CALL[@]}"
  exec {ANSWERS}>&-
  ANSWERS=1
  MASTER_ADDR=$(cat "$output")
  rm "$output"
  differs=$(grep '^launch: ' <<<"$MASTER_ADDR" | sort) || true
  [[ ! $differs ]] || { printf '%s\n' "${differs%%$'\n'*}" >&2; exit 2; } # one node's says enough
  export MASTER_ADDR
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
    # A rank that ends badly afterwards, or with its node, takes nothing away: another start would only wait for nodes.
    *:done) say "the target is reached$([[ $CODE == 0 ]] || echo ", and then the ranks ended with code $CODE")"; return 0 ;;
    2:*) stuck "the input is wrong, or a checkpoint cannot be read or written (exit code 2)" ;;
    17:*) stuck "a loss was NaN or infinite (exit code 17), the end of $RUN_DIR/starts.jsonl says where" ;;
  esac
  say "ended with code $CODE${SIGNAL:+ after $SIGNAL}, not at the target"
  return 1
}

state() { cat "$RUN_DIR/state" 2>/dev/null || true; } # done, continue or stuck

claim() { # claim OWNER: nobody else looks whose run_dir is and writes it down, until `release`
  local tries misses=0
  for ((tries = 0; ; tries++)); do
    # A link is made in one piece also on network file systems.
    ln -s "$1" "$RUN_DIR/job.lock" 2>/dev/null && break
    # It may just have been released, but not each time.
    if [[ -L $RUN_DIR/job.lock ]]; then misses=0; else ((++misses)); fi
    ((misses < 4)) || fail "run_dir=$RUN_DIR cannot be written: choose another"
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
  # shellcheck disable=SC2261  # a descriptor's number behind >& is that of the output alone
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

cut() { # cut SIGNAL: the ranks end at once, where what they have done lies on the disk; they may hang and hear nothing
  SIGNAL=$1
  [[ ! $STEP ]] || kill -KILL "$STEP"
}

shown() { # shown FIELD: what SLURM says of this job
  scontrol show job "${JOB:-none}" 2>/dev/null | sed -n "s/^\(.* \)\{0,1\}$1=\([^ ]*\).*/\2/p"
}

time_left() { # seconds to the job's time limit, or else a year
  local end
  end=$(shown EndTime)
  if [[ $end == [0-9]* ]]; then echo $(($(date -d "$end" +%s) - $(date +%s))); else echo 31536000; fi
}
