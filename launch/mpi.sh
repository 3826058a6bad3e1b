#!/bin/bash
# The same training where MPI starts the ranks: on a site without SLURM, or by `srun --mpi=pmix` in a job.
#
#   launch/mpi.sh mpirun -n 16 --hostfile hosts -- configs/olmoe_7b.yaml run_dir=/scratch/runs/moe7b
#   launch/mpi.sh srun --mpi=pmix -- configs/olmoe_7b.yaml run_dir=/scratch/runs/moe7b
#
# What stands before -- starts one process per GPU. All nodes need mpi4py and an MPI library: pip install
# 'megatron_fc[mpi]'. A run that breaks off is started again from its last checkpoint, as long as there is progress.
# USR1 and TERM to this script let the run save and end.

cd "$(dirname "$0")/.." || exit 2

NAME=mpi
OVERRIDES=()
source launch/common.sh
read_site

mpi=()
while [[ $# -gt 0 && $1 != -- ]]; do mpi+=("$1") && shift; done
[[ $# -ge 2 && ${#mpi[@]} -gt 0 ]] || fail "usage: launch/mpi.sh mpirun -n 16 ... -- CONFIG.yaml [key=value ...]"
CONFIG=$2
read_words "${@:3}"
# USR1 would kill a Python that has not yet set up its handler.
START=("${mpi[@]}" bash -c 'trap "" USR1; exec "$@"' task "$PYTHON" -m megatron_fc.mpi)

[[ $(state) != stuck ]] || rm "$RUN_DIR/state" "$RUN_DIR/launches"
until attempt || [[ $SIGNAL ]]; do sleep 5; done
