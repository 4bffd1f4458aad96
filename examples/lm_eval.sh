#!/usr/bin/env bash
# Runs lm-evaluation-harness on a run's checkpoint, or on a Hugging Face folder, without network.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: MODEL=DIR TASKS=NAME[,NAME ...] OUTPUT=DIR examples/lm_eval.sh [FLAG ...]

  MODEL       --save folder of a run, which is exported to OUTPUT/model, or a Hugging Face folder
  TASKS       tasks of the harness, or of your own files with --include_path DIR
  OUTPUT      folder for the results
optional:
  CKPT_STEP   iteration of the run's checkpoint (default: the latest)
  LOAD_HF     where the run's --load-hf folder is now, if it has moved
  DTYPE       type that the model computes in (default: that of its weights)

Flags go to the harness, as --num_fewshot 5 --batch_size auto --device cuda:0. It is installed by
pip install 'lm-eval[hf]'. Data sets that it needs must be in the cache already: run it once with
network, on any model.
END
    exit 2
}
[[ -n ${MODEL:-} && -n ${TASKS:-} && -n ${OUTPUT:-} ]] || usage

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=$MODEL
if [[ -e $MODEL/latest || -n ${CKPT_STEP:-} ]] || compgen -G "$MODEL/global_step*" >/dev/null; then
    model=$OUTPUT/model
    if [[ ! -e $model ]]; then
        flags=()
        [[ -z ${CKPT_STEP:-} ]] || flags+=(--ckpt-step "$CKPT_STEP")
        [[ -z ${LOAD_HF:-} ]] || flags+=(--load-hf "$LOAD_HF")
        mkdir -p "$OUTPUT"
        python "$repository/tools/convert_checkpoint.py" \
            --load "$MODEL" --save-hf "$model" ${flags[@]+"${flags[@]}"}
    fi
fi

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec lm_eval run --model hf --model_args "pretrained=$model,dtype=${DTYPE:-auto}" \
    --tasks "$TASKS" --output_path "$OUTPUT" "$@"
