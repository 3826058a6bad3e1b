#!/bin/bash
#SBATCH --job-name=moe7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log

# OLMoE-7B with Frac-Connections (DFCx4) on 3T tokens. Run it in the repository's folder:
#
#   launch/moe7b.sh --dry-run --nodes=8                  show what would be submitted, and check it
#   launch/moe7b.sh --nodes=8                            check and submit; options as for sbatch, e.g. -N 8
#   launch/moe7b.sh connection=residual                  overrides of configs/olmoe_7b.yaml: the baseline
#   . launch/site.sh && sbatch launch/moe7b.sh           the same without the check
#
# Ten minutes before the time limit (--signal above: longer than a step, a validation and a checkpoint take) the run
# saves, ends and is requeued, until it has seen all tokens. docs/launch.md has the rest.

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[[ -e launch/common.sh ]] || { echo "launch: submit from the repository's folder, not from $PWD" >&2; exit 2; }

NAME=moe7b
CONFIG=configs/olmoe_7b.yaml

source launch/common.sh
OVERRIDES+=(keep_every=25000) # a checkpoint for ever every 105B tokens
launch "$@"
