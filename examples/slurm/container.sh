#!/usr/bin/env bash
# Llama 2 13B on 4 nodes of 8 GPUs, each rank in a container, as a SLURM job. In the repository:
#
#   IMAGE=FILE DATA=PREFIX TOKENIZER=FILE SAVE=DIR \
#       sbatch examples/slurm/container.sh [FLAG ...]
#
# IMAGE is for enroot and SLURM's plugin pyxis (image.sqsh, or a registry's nvcr.io#nvidia/pytorch:TAG),
# or for Apptainer, if its name ends in .sif. It holds Python with what requirements.txt asks for; the
# batch script itself runs on the node, and needs nothing. MOUNTS are the folders that ranks see, at
# the same paths, beside the repository: those of DATA, TOKENIZER and SAVE (default: /data; MOUNTS= where
# all is in the repository). Apptainer does not start with one that a node lacks. Variables and flags are
# otherwise those of several_nodes.sh.
#SBATCH --job-name=sat-13b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=4-00:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

: "${IMAGE:?the container image, .sqsh for enroot or .sif for Apptainer}"

# Since SLURM 22.05 srun does not take it from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
srun="srun --kill-on-bad-exit=1"
mounts=$PWD:$PWD
for folder in ${MOUNTS-/data}; do
    mounts+=,$folder:$folder
done
# Ranks find each other by SLURM's variables: both pass the environment on (Apptainer without
# --cleanenv). python is the container's, and the repository is where it is on the node.
if [[ $IMAGE == *.sif ]]; then
    export LAUNCHER="$srun apptainer exec --nv --bind $mounts --pwd $PWD $IMAGE python"
else
    # To pyxis a name without a folder in front is a registry's.
    [[ $IMAGE != *.sqsh || $IMAGE == /* ]] || IMAGE=$PWD/$IMAGE
    # In images of PyTorch it sets RANK and LOCAL_RANK itself, and WORLD_SIZE on some clusters only.
    export LAUNCHER="$srun --container-image=$IMAGE --container-mounts=$mounts
        --container-workdir=$PWD env -u RANK -u LOCAL_RANK -u WORLD_SIZE python"
fi

exec examples/pretrain_multinode.sh "$@"
