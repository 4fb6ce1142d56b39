#!/usr/bin/env bash
# Data-parallel training (DDP) of examples/huggingface_trainer.py in several processes on one machine.
#
#   examples/launch/torchrun.sh [N_PROCESSES] [OUTPUT_DIR]      default: 2, a temporary folder
#
# Every process draws the same canaries (same seed, from the whole data set), scores its share of their batches,
# and hears the same verdict from the main process, which alone writes files.
#
# Tested: two CPU processes with gloo, this very script (tests/integration/test_launch_files.py).
# Not tested: GPUs with NCCL. There the script needs no change: it uses a GPU where it finds one.
set -euo pipefail

n_processes="${1:-2}"
output_dir="${2:-$(mktemp -d)}"

# One thread each, or the processes fight for the same cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Where there is no GPU, transformers has to be told that this is meant: else each process trains by itself.
if "${PYTHON:-python}" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    export ACCELERATE_USE_CPU=true
fi

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$n_processes" \
    "$(dirname "$0")/../huggingface_trainer.py" --output-dir "$output_dir"
