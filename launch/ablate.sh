#!/bin/bash
#SBATCH --job-name=ablate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A_%a.log

# The runs of a suite that are left, as an array of jobs of this size each. Run it in the repository's folder:
#
#   launch/ablate.sh configs/ablation/paper.yaml --dry-run --nodes=1      show what would be submitted, and check all runs
#   launch/ablate.sh SUITE.yaml [at_once=N] [--nodes=1 ...] [key=value ...]
#   megatron-fc ablate SUITE.yaml [key=value ...] --out FOLDER --table    take in what has finished, write the tables
#
# Each run is one of launch/moe7b.sh's kind: it goes on from job to job. Folders of runs lie in run_dir, by default
# ablate-SUITE in RUNS, which is FOLDER above; the site's overrides are for all runs, as key=value is. The same command
# again submits what is left then.

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[[ -e launch/common.sh ]] || { echo "launch: submit from the repository's folder, not from $PWD" >&2; exit 2; }

SUITE=${1:-}
CONFIG=$SUITE
NAME=ablate-$(basename "$SUITE" .yaml)
source launch/common.sh
[[ -e $SUITE ]] || fail "'$SUITE' is no file: launch/ablate.sh SUITE.yaml [at_once=N] [key=value ...]"

AT_ONCE='' rest=()
for word in "${@:2}"; do
  case $word in
    at_once=*) AT_ONCE=${word#*=} ;;
    words=*) # in the job: what `submit` has written down of this run
      mapfile -t of_run <"${word#*=}/$SLURM_ARRAY_TASK_ID"
      CONFIG=${of_run[0]}
      rest+=("${of_run[@]:1}")
      ;;
    *) rest+=("$word") ;;
  esac
done
[[ $AT_ONCE =~ ^([1-9][0-9]*)?$ ]] || fail "at_once=$AT_ONCE: give a number of runs"

submit() { # in place of one job: an array
  local said here=$PYTHON numbers words
  for said in SBATCH_ACCOUNT SBATCH_PARTITION; do # which sbatch itself reads
    [[ $DRY_RUN || ${!said-} != CHANGE_ME ]] || fail "$said is not set: set it in $SITE (empty: the site's default)"
    [[ ${!said-} && ${!said-} != CHANGE_ME ]] || unset "$said"
  done
  refuse_options
  [[ $(gpus) == 0 || $(gpus) == "$(option ntasks-per-node)" ]] ||
    fail "--gpus-per-node=$(gpus) and --ntasks-per-node=$(option ntasks-per-node) differ: every GPU has a task, give both"
  [[ ! $IMAGE ]] || here=$CHECK_PYTHON # its Python is not here
  check_folders
  [[ $DRY_RUN ]] || make_folders
  said=$RUN_DIR/words
  [[ ! $DRY_RUN ]] || said=$(mktemp -d)
  [[ ! $IS_EXAMPLE ]] || SITE_OVERRIDES=()
  numbers=$("$here" -m megatron_fc ablate "$SUITE" "${SITE_OVERRIDES[@]}" "${WORDS[@]}" --out "$RUN_DIR" --left "$said" \
    ${DRY_RUN:+--dry-run})
  [[ ! $DRY_RUN ]] || rm -r "$said"
  [[ $numbers ]] || { echo "no run is left: megatron-fc ablate $SUITE --out $RUN_DIR --table"; return; }
  words=(--job-name="$(basename "$RUN_DIR")" --array="$numbers${AT_ONCE:+%$AT_ONCE}" "${OPTIONS[@]}" "$0" "$SUITE"
    "words=$RUN_DIR/words" "checked=$(option nodes)x$(option ntasks-per-node)")
  if [[ $DRY_RUN ]]; then show sbatch "${words[@]}"; else hand_in "${words[@]}"; fi
}

launch "${rest[@]}"
