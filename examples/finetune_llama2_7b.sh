#!/usr/bin/env bash
# Llama 2 7B on one node of 8 GPUs with 80 GB, in the paper's fine-tuning setting: 1200 steps of 128
# records, r = 0.96 up to step 600, then dense; cosine learning rate with a peak of 1e-5, ZeRO-3. The
# paper does not say how long it warms up: 36 steps, 3 percent, are ours.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: MODEL=DIR DATA=FILE OUTPUT=DIR examples/finetune_llama2_7b.sh [FLAG ...]

  MODEL             folder of a model and its tokenizer in Hugging Face's form
  DATA              JSONL of chats ("messages"), or of "prompt" and "response"
  OUTPUT            folder for checkpoints, and OUTPUT/tuned for the result
optional:
  VALID             JSONL to evaluate on every 100 steps
  MICRO_BATCH_SIZE  records of one forward pass on a GPU (default: 4)
  DEEPSPEED_CONFIG  default: examples/deepspeed_finetune_zero3.json
  GPUS              default: 8; 128 is a multiple of GPUS times MICRO_BATCH_SIZE
  LAUNCHER          what starts the ranks (default: deepspeed on GPUS devices), as "torchrun ..."
  METHOD            sat (default), full, lora or ia3: the paper's comparisons

Flags are added at the end and replace those of this script.
END
    exit 2
}
[[ -n ${MODEL:-} && -n ${DATA:-} && -n ${OUTPUT:-} ]] || usage

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=${GPUS:-8}
micro_batch=${MICRO_BATCH_SIZE:-4}
method=${METHOD:-sat}
((128 % (gpus * micro_batch) == 0)) || {
    echo "error: 128 records are not a multiple of GPUS=$gpus times MICRO_BATCH_SIZE=$micro_batch" >&2
    exit 2
}
launcher=(deepspeed --quiet --num_gpus "$gpus")
# Unquoted, as it is a list.
[[ -z ${LAUNCHER:-} ]] || launcher=($LAUNCHER)
optional=()
[[ -z ${VALID:-} ]] || optional+=(--validation_file "$VALID" --eval_strategy steps --eval_steps 100)
if [[ $method == sat ]]; then
    optional+=(--sat-omission-rate 0.96 --sat-total-steps 1200 --sat-decay-start-step 600)
    optional+=(--sat-ladder-rungs 1 --learning_rate 1e-5)
fi

exec "${launcher[@]}" "$repository/finetune_sat.py" \
    --model_name_or_path "$MODEL" --train_file "$DATA" --output_dir "$OUTPUT" --method "$method" \
    --max_length 2048 --train_sampling_strategy group_by_length \
    --max_steps 1200 --per_device_train_batch_size "$micro_batch" \
    --gradient_accumulation_steps $((128 / (gpus * micro_batch))) \
    --lr_scheduler_type cosine --warmup_steps 36 --bf16 \
    --gradient_checkpointing --deepspeed "${DEEPSPEED_CONFIG:-$repository/examples/deepspeed_finetune_zero3.json}" \
    --logging_steps 10 --save_steps 200 --save_total_limit 2 --report_to none \
    "${optional[@]}" "$@"
