#!/usr/bin/env bash
# Megatron-LM's own pretrain_gpt.py, unmodified, with Frac-Connections: only the last line is new.
#
#   MEGATRON_LM=/path/to/Megatron-LM examples/pretrain_gpt.sh [flags of pretrain_gpt.py]
#
# Needs a checkout of Megatron-LM of the version of your megatron-core, since the wheel lacks the script. The data are
# Megatron's mock data. The model is small: it trains in a minute on two CPU cores, or on a GPU.
#
# You should see Megatron's own log. Its number of parameters is 99416, of which 792 are the connections', and the loss falls:
#
#   iteration        1/      20 | ... | lm loss: 4.8...
#   iteration       20/      20 | ... | lm loss: 2.5...
#
# Other kinds: NAME=dhc_x4, mhc_x4, sfc_x2 (docs/plug-in.md).
set -euo pipefail
: "${MEGATRON_LM:?set it to a checkout of Megatron-LM, which has pretrain_gpt.py}"

script=("$MEGATRON_LM/pretrain_gpt.py")
device=()
if ! nvidia-smi >/dev/null 2>&1; then
    script=("$(dirname "${BASH_SOURCE[0]}")/on_cpu.py" "${script[@]}")  # Megatron assumes CUDA
    device=(--distributed-backend gloo)
fi

torchrun --standalone --nproc-per-node="${RANKS:-1}" "${script[@]}" "${device[@]}" \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 \
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm \
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights \
    --attention-dropout 0 --hidden-dropout 0 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters 20 --lr 3e-3 --eval-interval 20 --eval-iters 1 --log-interval 5 \
    --transformer-impl local --attention-backend unfused --no-rope-fusion --no-masked-softmax-fusion \
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion --no-bias-dropout-fusion \
    "$@" \
    --spec megatron_fc.megatron.specs "${NAME:-dfc_x4}"
