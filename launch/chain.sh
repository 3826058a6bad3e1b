#!/bin/bash
# For sites that do not requeue jobs: N jobs of a run, one after the other, each going on from the last checkpoint.
#
#   launch/chain.sh 20 launch/moe7b.sh --nodes=8
#
# SLURM starts a job of this kind when no other one of the same name is left. Once the target is reached, or the run is
# stuck, the rest of the chain ends at once.

set -euo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ && -x ${2:-} ]] || { echo "usage: launch/chain.sh N SCRIPT [its arguments]" >&2; exit 2; }
words=("$2" "${@:3}" --dependency=singleton --no-requeue)
"${words[@]}"
for ((i = 1; i < $1; i++)); do CHECK=no "${words[@]}"; done
