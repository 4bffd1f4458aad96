#!/usr/bin/env bash
# A run that is longer than a job may be, or that is preempted: the job goes back to the queue and
# on from its last checkpoint, until training is done. In the repository, with its environment active:
#
#   DATA=PREFIX TOKENIZER=FILE SAVE=DIR sbatch examples/slurm/chain.sh --save-interval 100 [FLAG ...]
#
# SCRIPT is what trains (default: examples/pretrain_llama2_7b.sh); variables and flags are its own.
#
# A checkpoint is written every --save-interval steps and at the end. Nothing is saved when the job
# is stopped: the steps since the last checkpoint are done again, and the run is then the one that
# was never stopped. Choose an interval that you can afford to lose each time. Every start is the same
# command: --auto-resume finds the last complete checkpoint in SAVE, or begins (LOAD) where there is
# none.
#
# The job is requeued 2 minutes before its time is over, by this script; when it is preempted (where
# the cluster preempts with PreemptMode=REQUEUE) or a node fails, by SLURM. A run that ends with an
# error ends the chain. To end it yourself: scancel.
#SBATCH --job-name=sat-chain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

: "${SAVE:?the folder of checkpoints, by which the chain finds where it was}"

requeue() {
    echo "chain.sh: time is nearly over; back to the queue, to go on from $SAVE"
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

# Since SLURM 22.05 srun does not take it from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export LAUNCHER="srun --kill-on-bad-exit=1 python"
# In the background, as bash acts on a signal only between commands.
"${SCRIPT:-examples/pretrain_llama2_7b.sh}" --auto-resume "$@" &
training=$!
code=0
wait "$training" || code=$?
if ((code > 128)) && kill -0 "$training" 2>/dev/null; then
    # The signal ended `wait`, not the training: that goes on until SLURM ends it.
    code=0
    wait "$training" || code=$?
fi
exit "$code"
