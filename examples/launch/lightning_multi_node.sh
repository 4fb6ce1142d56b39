#!/usr/bin/env bash
# Lightning with DDP on two nodes of four GPUs each, under SLURM:
#
#   sbatch examples/launch/lightning_multi_node.sh
#
# In the script, `pl.Trainer(accelerator="gpu", devices=4, num_nodes=2, strategy="ddp")` has to agree with the lines
# below; everything else in examples/lightning_module.py stays. `default_root_dir` must be a folder that all nodes
# see: checkpoints and the reference are read from it on resume.
#
# Not tested: several nodes, SLURM, GPUs.
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
