#!/usr/bin/env bash
# Llama 2 7B on one node of 8 GPUs, as a SLURM job. In the repository, with its environment active:
#
#   DATA=PREFIX TOKENIZER=FILE SAVE=DIR sbatch examples/slurm/single_node.sh [FLAG ...]
#
# Variables and flags are those of examples/pretrain_llama2_7b.sh. What your cluster wants besides
# goes in front of the script's name: sbatch --account=NAME --partition=NAME --time=12:00:00 ...
#SBATCH --job-name=sat-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# Since SLURM 22.05 srun does not take it from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# One rank for each task; a rank that fails ends the others.
export LAUNCHER="srun --kill-on-bad-exit=1 python"
exec examples/pretrain_llama2_7b.sh "$@"
