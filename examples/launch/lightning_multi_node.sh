#!/usr/bin/env bash
# Lightning with DDP on two nodes of four GPUs each, under SLURM:
#
#   export OUTPUT_DIR=/a/folder/that/all/nodes/see
#   sbatch examples/launch/lightning_multi_node.sh
#
# Checkpoints and the reference are read from that folder on resume. examples/lightning_module.py asks SLURM for the
# number of nodes, and trains on the GPUs that it finds, or on one CPU process a node.
#
# Tested: this very script with two nodes of one CPU process each, both on one machine, with a stand-in for `srun`.
# Not tested: SLURM, several machines, GPUs.
#SBATCH --job-name=ezmia-lightning
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
# A warning ahead of the time limit: Lightning saves a checkpoint on it and queues the job again.
#SBATCH --signal=SIGUSR1@90
set -euo pipefail

# SLURM starts a copy of this file elsewhere: the folder is the one that sbatch was called in.
exec srun "${PYTHON:-python}" "${SLURM_SUBMIT_DIR:-.}/examples/lightning_module.py" \
    --output-dir "${OUTPUT_DIR:?set OUTPUT_DIR to a folder that all nodes see}"
