# The words behind a launch script: options of sbatch, and overrides of the config.
# shellcheck shell=bash disable=SC2034
#
# A word that begins with - is an option of sbatch. Its value stands behind = or in the next word, as for sbatch itself:
# --nodes=8, --nodes 8, -N 8, -N8. Every other word is an override, key=value; so what looks like one is the value of an
# option only behind its =.

# sbatch's options that take no value, or one behind = only.
NO_VALUE=" contiguous exclusive get-user-env hold ignore-pbs nice no-kill no-requeue overcommit oversubscribe parsable \
propagate quiet reboot requeue share spread-job stepmgr test-only use-min-nodes verbose version wait "

read_words() { # sets DRY_RUN, OPTIONS (sbatch's, as --name=value), WORDS (overrides), RUN_DIR and CHECKED, if given
  local word name value
  DRY_RUN='' OPTIONS=() WORDS=() RUN_DIR='' CHECKED=''
  while (($#)); do
    word=$1 && shift
    case $word in
      --dry-run) DRY_RUN=yes && continue ;;
      -h | --help) usage && exit ;;
      --?*=*) name=${word%%=*} && refuse_setting "${name#--}" "$word" && OPTIONS+=("$word") && continue ;;
      --?*) name=${word#--} value='' && refuse_setting "$name" "$word=${1:-VALUE}" ;;
      -?*) long_name "${word:1:1}" && name=$LONG value=${word:2} ;;
      save=* | *.save=*) fail "$word: checkpoints lie in run_dir, drop save" ;;
      ckpt_step=* | *.ckpt_step=*)
        fail "$word would hold for every start: write ${word#*=} into run_dir's" \
          "checkpoints/latest_checkpointed_iteration.txt instead"
        ;;
      run_dir=* | *.run_dir=*) RUN_DIR=${word#*=} RUN_DIR=${RUN_DIR/#"~/"/"$HOME/"} && continue ;;
      checked=*) CHECKED=${word#*=} && continue ;; # nodes x tasks, which `submit` tells the job
      *=*) WORDS+=("$word") && continue ;;
      *) fail "'$word' is neither an option of sbatch (--nodes 8) nor an override (key=value)" ;;
    esac
    if [[ $NO_VALUE == *" $name "* ]]; then
      [[ ! $value ]] || fail "$word: --$name takes no value"
      OPTIONS+=("--$name")
      continue
    fi
    if [[ ! $value && ${1:-} && $1 != -* && ! $1 =~ ^[a-z][a-z0-9_.]*= ]]; then value=$1 && shift; fi
    [[ $value && $value != =* ]] || fail "$word has no value: write --$name=VALUE"
    OPTIONS+=("--$name=$value")
  done
}

refuse_setting() { # refuse_setting NAME AS_GIVEN: a key of the config behind --, which sbatch would get
  local key=${1//-/_}
  [[ ! $(setting "$key") ]] || fail "--$1 is no option of sbatch; an override is $key=${2#*=}"
}

own_words() { # own_words 'NAME ...' WORDS: NAME=VALUE sets NAME in capitals and is among OWN; REST are the others
  local word name
  OWN=() REST=()
  for word in "${@:2}"; do
    name=${word%%=*}
    if [[ $word == *=* && " $1 " == *" $name "* ]]; then
      printf -v "${name^^}" %s "${word#*=}"
      OWN+=("$word")
    else
      REST+=("$word")
    fi
  done
}

long_name() { # sets LONG to the name of sbatch's option -$1
  case $1 in
    A) LONG=account ;; a) LONG=array ;; B) LONG=extra-node-info ;; b) LONG=begin ;; C) LONG=constraint ;;
    c) LONG=cpus-per-task ;; D) LONG=chdir ;; d) LONG=dependency ;; e) LONG=error ;; F) LONG=nodefile ;;
    G) LONG=gpus ;; H) LONG=hold ;; i) LONG=input ;; J) LONG=job-name ;; k) LONG=no-kill ;; L) LONG=licenses ;;
    M) LONG=clusters ;; m) LONG=distribution ;; N) LONG=nodes ;; n) LONG=ntasks ;; O) LONG=overcommit ;;
    o) LONG=output ;; p) LONG=partition ;; Q) LONG=quiet ;; q) LONG=qos ;; S) LONG=core-spec ;;
    s) LONG=oversubscribe ;; t) LONG="time" ;; V) LONG=version ;; v) LONG=verbose ;; W) LONG="wait" ;;
    w) LONG=nodelist ;; x) LONG=exclude ;;
    *) fail "-$1 is no option of sbatch" ;;
  esac
}

# What the scripts read, or refuse, has to be written out: sbatch takes --gpus-per-n, too.
WRITTEN_OUT="nodes ntasks-per-node gpus-per-node gpus-per-task gpus-per-socket ntasks-per-gpu gres tres-per-task \
cpus-per-task array signal output dependency job-name time wait wrap"

refuse_options() { # those that change the number of ranks or GPUs, or what the script rests on; sbatch's variables, too
  local word name known
  for word in "${OPTIONS[@]}"; do
    name=${word#--} && name=${name%%=*}
    for known in $WRITTEN_OUT; do
      [[ $known != "$name"?* || $name == gpus || $name == ntasks ]] || fail "$word: write --$known out"
    done
    refuse_option "$name" "${word#*=}" "$word"
  done
  for name in gpus gpus-per-task gres array-inx signal wait; do
    word=SBATCH_${name^^} && word=${word//-/_}
    [[ ! ${!word:-} ]] || refuse_option "${name%-inx}" "${!word}" "$word=${!word}"
  done
  refuse_short_time
}

refuse_short_time() { # the run would be told to save and end when it starts, in every job
  local limit signal seconds
  limit=$(option time) signal=$(option signal)
  [[ $signal == *@* ]] || signal+=@60 # as sbatch has it
  seconds=$(seconds_of "$limit")
  [[ ! $seconds ]] || ((seconds == 0 || seconds > 10#${signal#*@})) || # 0 is no limit
    fail "--time=$limit is not longer than the ${signal#*@} s of --signal=$signal: give more --time, or a smaller" \
      "--signal=B:USR1@SECONDS"
}

seconds_of() { # seconds_of TIME: as sbatch reads it, M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; nothing for other words
  local days=0 clock=$1 a b c
  [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 0
  [[ $1 != *-* ]] || days=${1%%-*} clock=${1#*-}
  IFS=: read -r a b c <<<"$clock"
  if [[ $1 == *-* || $c ]]; then
    echo $((10#$days * 86400 + 10#$a * 3600 + 10#${b:-0} * 60 + 10#${c:-0}))
  else
    echo $((10#$a * 60 + 10#${b:-0}))
  fi
}

refuse_option() { # refuse_option NAME VALUE AS_GIVEN
  local tasks="the layout depends on the number of tasks and GPUs: give --nodes, --ntasks-per-node and --gpus-per-node"
  case $1 in
    gres | tres-per-task) [[ $2 != *gpu* ]] || fail "$3: $tasks" ;;
    gpus | gpus-per-task | gpus-per-socket | ntasks | ntasks-per-gpu) fail "$3: $tasks" ;;
    array) fail "$3: its jobs would share run_dir: launch/chain.sh N SCRIPT ..., or one command for each run" ;;
    signal) [[ $2 =~ ^R?B:(SIG)?USR1(@[0-9]+)?$ ]] || fail "$3: the script listens for B:USR1@SECONDS" ;;
    wait) fail "$3: sbatch would return at the end of the job, which is written down before: leave it out" ;;
    wrap) fail "$3: the script is what is submitted: leave it out" ;;
  esac
}

option() { # option NAME: the value given to sbatch, else in its variable, else that of the script's #SBATCH line
  local word value
  value=$(sed -n "s/^#SBATCH --$1=//p" "$0")
  case $1 in
    gpus-per-node) value=${SBATCH_GPUS_PER_NODE:-$value} ;;
    output) value=${SBATCH_OUTPUT:-$value} ;;
    signal) value=${SBATCH_SIGNAL:-$value} ;;
    time) value=${SBATCH_TIMELIMIT:-$value} ;;
  esac
  for word in "${OPTIONS[@]}"; do [[ $word == "--$1="* ]] && value=${word#*=}; done
  echo "$value"
}

setting() { # setting NAME: its value in CONFIG
  sed -n "/^ \+$1:/{s/^[^:]*: *\([^ #]*\).*/\1/p;q}" "${CONFIG:-}" 2>/dev/null
}

show() { # quoted where a shell needs it
  local word
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf '%s ' "$word"; else printf '%s ' "${word@Q}"; fi
  done
  echo
}

usage() { # the script's own description
  sed -n '/^# /,/^$/{/^$/q;s/^# \{0,1\}//p}' "$0"
}
