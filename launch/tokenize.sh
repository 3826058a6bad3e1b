#!/bin/bash
# Tokenize text by an array of SLURM jobs without GPUs, with the same site file as training. In the repository's folder:
#
#   launch/tokenize.sh --dry-run --time=12:00:00 -- src --out data/web --tokenizer NAME --tasks 1000
#   launch/tokenize.sh --time=12:00:00 --mem-per-cpu=4G -- src --out data/web --tokenizer NAME --tasks 1000 --workers 200
#   megatron-fc data status data/web
#
# show what would be called, submit it, and show how far it is. The same command again submits the tasks that are not done.
# Options of sbatch stand before --, as --NAME=VALUE; what stands behind is for `megatron-fc data tokenize`. 90 seconds
# before the time limit a task ends and its job is requeued, once, to do it again from its beginning: give time for a
# whole one.

cd "$(dirname "$0")/.." || exit 2

source launch/common.sh

sbatch=() dry_run=''
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --?*=*) sbatch+=(--sbatch="${1#--}") ;;
    *) fail "$1: write options of sbatch as --NAME=VALUE, and -- behind them" ;;
  esac
  shift
done
[[ $# -ge 2 ]] || fail "usage: launch/tokenize.sh --time=HH:MM:SS ... -- INPUT ... --out FOLDER --tokenizer NAME"
shift
DRY_RUN=$dry_run
read_site
for said in SBATCH_ACCOUNT SBATCH_PARTITION; do # which sbatch itself reads
  [[ $dry_run || ${!said-} != CHANGE_ME ]] || fail "$said is not set: set it in $SITE (empty: the site's default)"
  [[ ${!said-} ]] || unset "$said"
done

srun=() here=$PYTHON
if [[ $IMAGE ]]; then # its Python is not here
  here=$CHECK_PYTHON
  srun=(--srun="--container-image=$IMAGE" ${MOUNTS:+"--srun=--container-mounts=$MOUNTS"} --srun="--container-workdir=$PWD")
fi
words=("$here" -m megatron_fc data tokenize "$@" --executor slurm --python "$PYTHON" "${sbatch[@]}" "${srun[@]}")
[[ $dry_run ]] || exec "${words[@]}"
show "${words[@]}"
echo "note: that hands an array of the tasks that are not done, at most --workers at once, to" \
  "$(show sbatch "${sbatch[@]/#--sbatch=/--}")with the script that it writes into logs/ of --out" >&2
