#!/usr/bin/env bash
# A run that is longer than a job may be, or that is preempted: the job goes back to the queue and
# on from its last checkpoint, until training is done. In the repository, with its environment active:
#
#   DATA=PREFIX TOKENIZER=FILE SAVE=DIR sbatch examples/slurm/chain.sh --save-interval 100 [FLAG ...]
#
# SCRIPT is what trains (default: examples/pretrain_llama2_7b.sh); variables and flags are its own.
#
# A checkpoint is written every --save-interval steps and at the end, and when the job is stopped:
# SLURM sends SIGUSR1 to the ranks 5 minutes before its time is over, SIGTERM when it is preempted.
# They finish their step, save, and end with code 75, and the next start is the run that was never
# stopped. Where that takes longer than SLURM waits (KillWait, 30 s by default, at a preemption), or
# a node fails, the steps since the last checkpoint are done again: choose an interval that you can
# afford to lose. Every start is the same command: --auto-resume finds the last complete checkpoint in
# SAVE, or begins (LOAD) where there is none.
#
# The job is requeued by this script when the ranks have ended with 75; when it is preempted (where
# the cluster preempts with PreemptMode=REQUEUE) or a node fails, by SLURM. Any other code is an
# error, and ends the chain. To end it yourself: scancel.
#SBATCH --job-name=sat-chain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

: "${SAVE:?the folder of checkpoints, by which the chain finds where it was}"

# Since SLURM 22.05 srun does not take it from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export LAUNCHER="srun --kill-on-bad-exit=1 python"
code=0
"${SCRIPT:-examples/pretrain_llama2_7b.sh}" --auto-resume "$@" || code=$?
if ((code == 75)); then
    echo "chain.sh: stopped and saved; back to the queue, to go on from $SAVE"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
