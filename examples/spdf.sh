#!/usr/bin/env bash
# What the paper compares SAT with (SPDF, Thangarasa et al. 2023, adapted to continual
# pre-training): one fixed subset of heads and channels up to step 2000, then the whole model.
# A ladder of one rung has its only rung dense. Variables and flags: see pretrain_llama2_7b.sh.
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/pretrain_llama2_7b.sh" \
    --sat-selection static --sat-ladder-rungs 1 "$@"
