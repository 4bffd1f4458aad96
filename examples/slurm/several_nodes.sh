#!/usr/bin/env bash
# Llama 2 13B on 4 nodes of 8 GPUs, as a SLURM job. In the repository, with its environment active:
#
#   DATA=PREFIX TOKENIZER=FILE SAVE=DIR sbatch examples/slurm/several_nodes.sh [FLAG ...]
#
# Variables and flags are those of examples/pretrain_multinode.sh, without HOSTFILE: srun starts the
# ranks, and they find each other by SLURM's variables. The repository, the environment, data and
# SAVE are at the same paths on all nodes. What your cluster wants besides goes in front of the
# script's name: sbatch --account=NAME --partition=NAME --nodes=8 ...
#SBATCH --job-name=sat-13b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=4-00:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# Since SLURM 22.05 srun does not take it from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# One rank for each task; a rank that fails ends the others.
export LAUNCHER="srun --kill-on-bad-exit=1 python"

# Where nodes have several networks, name the one that ranks use:
#
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

exec examples/pretrain_multinode.sh "$@"
