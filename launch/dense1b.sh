#!/bin/bash
#SBATCH --job-name=dense1b
#SBATCH --nodes=4
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

# OLMo2-1B, dense, with Frac-Connections (DFCx4) on 2T tokens. Run it in the repository's folder:
#
#   launch/dense1b.sh --dry-run --nodes=4                show what would be submitted, and check it
#   launch/dense1b.sh --nodes=4                          check and submit; options as for sbatch, e.g. -N 4
#   launch/dense1b.sh connection=residual                overrides of configs/olmo2_1b.yaml: the baseline
#
# launch/moe7b.sh describes how it goes on from job to job.

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[[ -e launch/common.sh ]] || { echo "launch: submit from the repository's folder, not from $PWD" >&2; exit 2; }

NAME=dense1b
CONFIG=configs/olmo2_1b.yaml

source launch/common.sh
OVERRIDES+=(keep_every=50000)
launch "$@"
