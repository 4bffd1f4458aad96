#!/usr/bin/env bash
# Llama 2 13B on several nodes, started from one of them: 4 nodes of 8 GPUs make the paper's 32.
# Needs passwordless ssh between the nodes (or a LAUNCHER that does without), and this repository, the
# environment, data and SAVE at the same paths on all of them.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: HOSTFILE=FILE DATA=PREFIX TOKENIZER=FILE SAVE=DIR examples/pretrain_multinode.sh [FLAG ...]

  HOSTFILE          a line for each node, as "node1 slots=8"
  DATA              training data, or a blend: "0.7 PREFIX 0.3 PREFIX" (tools/preprocess_data.py)
  TOKENIZER         SentencePiece .model file
  SAVE              folder for checkpoints and metrics.jsonl, on a file system that all nodes share
optional:
  VALID             validation sets: "old=PREFIX new=PREFIX" (default: a share of DATA)
  LOAD              folder of an earlier run of this trainer to start from (default: random weights)
  MICRO_BATCH_SIZE  sequences of one forward pass on a GPU (default: 2)
  TENSOR_PARALLEL   GPUs that share a layer, within a node (default: 1); above 1 with sequence
                    parallelism
  DEEPSPEED_CONFIG  default: examples/deepspeed_zero3.json; docs/training.md says which others are
                    faster, and what they need
  LAUNCHER          what starts the ranks (default: deepspeed), as "srun python", which needs no
                    HOSTFILE and no ssh

Flags are added at the end and replace those of this script: --sat-omission-rate 0 trains dense.
END
    exit 2
}
[[ -n ${HOSTFILE:-}${LAUNCHER:-} && -n ${DATA:-} && -n ${TOKENIZER:-} && -n ${SAVE:-} ]] || usage

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launcher=(deepspeed --quiet --hostfile "${HOSTFILE:-}")
optional=()
# Unquoted, as these are lists.
[[ -z ${LAUNCHER:-} ]] || launcher=($LAUNCHER)
[[ -z ${VALID:-} ]] || optional+=(--valid-data $VALID)
[[ -z ${LOAD:-} ]] || optional+=(--load "$LOAD" --finetune)
if ((${TENSOR_PARALLEL:-1} > 1)); then
    optional+=(--tensor-model-parallel-size "$TENSOR_PARALLEL" --sequence-parallel)
fi

exec "${launcher[@]}" "$repository/pretrain_sat.py" \
    --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824 --num-attention-heads 40 \
    --seq-length 4096 --untie-embeddings-and-output-weights \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" \
    --data-path $DATA \
    --micro-batch-size "${MICRO_BATCH_SIZE:-2}" --global-batch-size 1024 --train-iters 3000 \
    --lr 5e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 \
    --bf16 \
    --deepspeed_config "${DEEPSPEED_CONFIG:-$repository/examples/deepspeed_zero3.json}" \
    --sat-omission-rate 0.5 --sat-decay-start-step 2000 --sat-ladder-rungs 5 \
    --sat-metric maxip --sat-selection sampling --sat-temperature 0.05 \
    --eval-interval 100 --eval-iters 2 --log-interval 10 \
    --save "$SAVE" --save-interval 500 --auto-resume \
    "${optional[@]}" "$@"
