#!/usr/bin/env bash
# Llama 2 7B on one node of 8 GPUs with 80 GB, in the paper's setting: 3000 steps of 1024 sequences
# of 4096 tokens; r = 0.5 up to step 2000, then a ladder of 5 rungs.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: DATA=PREFIX TOKENIZER=FILE SAVE=DIR examples/pretrain_llama2_7b.sh [FLAG ...]

  DATA              training data, or a blend: "0.7 PREFIX 0.3 PREFIX" (tools/preprocess_data.py)
  TOKENIZER         SentencePiece .model file
  SAVE              folder for checkpoints and metrics.jsonl; a run in it goes on
optional:
  VALID             validation sets: "old=PREFIX new=PREFIX" (default: a share of DATA)
  LOAD              folder of an earlier run of this trainer to start from (default: random weights)
  MICRO_BATCH_SIZE  sequences of one forward pass on a GPU (default: 2)
  DEEPSPEED_CONFIG  default: examples/deepspeed_zero3.json; docs/training.md says which others are
                    faster, and what they need
  GPUS              default: 8
  LAUNCHER          what starts the ranks (default: deepspeed on GPUS devices), as "srun python"

Flags are added at the end and replace those of this script: --sat-omission-rate 0 trains dense.
END
    exit 2
}
[[ -n ${DATA:-} && -n ${TOKENIZER:-} && -n ${SAVE:-} ]] || usage

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launcher=(deepspeed --quiet --num_gpus "${GPUS:-8}")
optional=()
# Unquoted, as these are lists.
[[ -z ${LAUNCHER:-} ]] || launcher=($LAUNCHER)
[[ -z ${VALID:-} ]] || optional+=(--valid-data $VALID)
[[ -z ${LOAD:-} ]] || optional+=(--load "$LOAD" --finetune)

exec "${launcher[@]}" "$repository/pretrain_sat.py" \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 \
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
