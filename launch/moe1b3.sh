#!/bin/bash
#SBATCH --job-name=moe1b3
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

# The paper's ablation: OLMoE-1.3B on 500B tokens, one of its variants. Run it in the repository's folder:
#
#   launch/moe1b3.sh VARIANT [--dry-run] [--nodes=4 ...] [key=value ...]
#
# VARIANT is residual, sfc_x4, dfc_x2, dfc_x4, or one of DFCx2 without a part: no_norm, no_tanh, no_scale. All of them:
#
#   for v in residual sfc_x4 dfc_x2 dfc_x4 no_norm no_tanh no_scale; do launch/moe1b3.sh $v; done
#
# launch/moe7b.sh describes how a run goes on from job to job.

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[[ -e launch/common.sh ]] || { echo "launch: submit from the repository's folder, not from $PWD" >&2; exit 2; }

VARIANT=${1:-}
NAME=moe1b3-$VARIANT
CONFIG=configs/olmoe_1b3.yaml

source launch/common.sh
case $VARIANT in
  residual) OVERRIDES+=(connection=residual) ;;
  sfc_x4) OVERRIDES+=(connection=sfc rate=4) ;;
  dfc_x2) OVERRIDES+=(connection=dfc rate=2) ;;
  dfc_x4) OVERRIDES+=(connection=dfc rate=4) ;;
  no_norm) OVERRIDES+=(connection=dfc rate=2 norm=none) ;;
  no_tanh) OVERRIDES+=(connection=dfc rate=2 tanh=false) ;;
  no_scale) OVERRIDES+=(connection=dfc rate=2 scale=false) ;;
  *) fail "'$VARIANT' is no variant: residual, sfc_x4, dfc_x2, dfc_x4, no_norm, no_tanh or no_scale comes first" ;;
esac
launch "${@:2}"
