#!/usr/bin/env bash
# A public checkpoint gets connections: OLMoE or OLMo2 of Hugging Face becomes a Megatron checkpoint, which trains on with
# Frac-Connections. The first loss is that of the public model.
#
#   examples/upcycle.sh [SOURCE [CONFIG [key=value ...]]]
#
# SOURCE is a name on the hub or a folder with safetensors, by default allenai/OLMoE-1B-7B-0924 (14 GB, and GPUs to train
# it); CONFIG is by default configs/olmoe_7b.yaml, whose data you prepare (docs/data.md). What it makes lies in FOLDER, by
# default runs/upcycling. Called again, it goes on from the last checkpoint.
#
# You should see how many tensors the connections add, and a first loss as low as the public model's:
#
#   from_residual: 14 dfc_x4 tensors are missing in runs/upcycling/weights/release and start as plain residuals, ...
set -euo pipefail
source=${1:-allenai/OLMoE-1B-7B-0924}
config=${2:-configs/olmoe_7b.yaml}
folder=${FOLDER:-runs/upcycling}
overrides=("${@:3}")

if [ ! -e "$folder/weights" ]; then
    megatron-fc convert from-hf "$source" "$config" "${overrides[@]}" --to "$folder/weights"
fi
megatron-fc train "$config" from_residual=true load="$folder/weights" run_dir="$folder/dfc_x4" "${overrides[@]}"
