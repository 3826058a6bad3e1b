# What differs from site to site. Copy to launch/site.sh and fill in; every launch script sources it.
# shellcheck shell=bash disable=SC2034

# Read by sbatch itself. Empty: the site's default, for which sbatch must not see them.
export SBATCH_ACCOUNT=CHANGE_ME
export SBATCH_PARTITION=CHANGE_ME
[ "$SBATCH_ACCOUNT" ] || unset SBATCH_ACCOUNT
[ "$SBATCH_PARTITION" ] || unset SBATCH_PARTITION

# Folders of runs go here: a file system that all nodes see, with room for checkpoints.
RUNS=/scratch/$USER/runs

# On GPUs: the image of docker/README.md. The .venv of `make` has no Transformer Engine: layers need more memory, and
# Megatron cannot read back the state of the configs' distributed optimizer, so pre-flight refuses the run.
# Container through pyxis/enroot: a .sqsh file or registry address; empty for the bare environment.
IMAGE=
MOUNTS=$PWD:$PWD,/scratch:/scratch
# In a container its Python: python3. Bare environment: the Python of an environment that all nodes see.
PYTHON=$PWD/.venv/bin/python
# With an image: a Python here with megatron_fc, which checks config and data before a job is submitted; no GPU needed.
CHECK_PYTHON=$PWD/.venv/bin/python

# Overrides for every run, e.g. where the data are. The command line wins over them.
SITE_OVERRIDES=(
  'train_data_path=[/scratch/data/dolma/train]'
  'valid_data_path=[/scratch/data/dolma/valid]'
  # 'per_split_data_args_path=/scratch/data/blend.json' # a blend, in place of the two lines above
  'tokenizer_model=/scratch/data/tokenizer'
)

# Network and threads.
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron asks for it with tensor parallelism before Blackwell
export OMP_NUM_THREADS=1
