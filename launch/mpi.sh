#!/bin/bash
# The same training where MPI starts the ranks: on a site without SLURM, or by `srun --mpi=pmix` in a job.
#
#   launch/mpi.sh mpirun -n 16 --hostfile hosts -- configs/olmoe_7b.yaml keep_every=25000 run_dir=/scratch/runs/moe7b
#   launch/mpi.sh srun --mpi=pmix -- configs/olmoe_7b.yaml keep_every=25000 run_dir=/scratch/runs/moe7b
#
# What stands before -- starts one process per GPU. All nodes need mpi4py and an MPI library: pip install
# 'THIS_CHECKOUT[train,mpi]'. A run that breaks off is started again from its last checkpoint, as long as there is progress.
# USR1 and TERM to this script let the run save and end, with exit code 75: start the same again. --dry-run behind the
# config shows the command.

cd "$(dirname "$0")/.." || exit 2

NAME=mpi
source launch/common.sh

mpi=()
while [[ $# -gt 0 && $1 != -- ]]; do mpi+=("$1") && shift; done
[[ $# -ge 2 && ${#mpi[@]} -gt 0 ]] || fail "usage: launch/mpi.sh mpirun -n 16 ... -- CONFIG.yaml [key=value ...]"
CONFIG=$2
prepare "${@:3}"
no_options "nothing is submitted here, and what starts the ranks stands before --"

# mpirun takes no environment to other hosts: what the site file exports goes along by name.
environment=()
# shellcheck disable=SC2016  # expanded there
for name in $(env -i bash -c 'source "$1" >&2; compgen -e' _ "$SITE" 2>/dev/null); do
  [[ $name =~ ^(PWD|OLDPWD|SHLVL|_|SBATCH_.*)$ ]] || environment+=("$name=${!name-}")
done
# A signal would kill a Python that has not yet set up its handlers.
# shellcheck disable=SC2016  # expanded in the task
task='trap "" USR1 TERM; export SHIFT=$(cat "$1" 2>/dev/null || echo 0); exec env "${@:2}"'
START=("${mpi[@]}" bash -c "$task" task "$RUN_DIR/shift" "${environment[@]}" "$PYTHON" -m megatron_fc.mpi)

if [[ $DRY_RUN ]]; then
  show "${START[@]}" "${COMMAND[@]}" "${ARGS[@]}"
  exit
fi

[[ $(state) != stuck ]] || rm "$RUN_DIR/state" "$RUN_DIR/launches"
until attempt; do
  sleep 5
  [[ ! $SIGNAL ]] || exit 75
done
