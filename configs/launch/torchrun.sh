#!/bin/bash
# One training run over several nodes, started with torchrun. Run this once on every node, with the
# same arguments on all of them:
#
#   MASTER=node1 NODES=2 GPUS=8 bash configs/launch/torchrun.sh --config configs/sd35_medium_apex.yaml
#
# MASTER  host name of the node where the processes meet, one of the nodes
# NODES   number of nodes
# GPUS    processes per node, one per GPU
# PORT    a free port of MASTER (default 29500)
# RUN     a name, if several runs meet on one port
#
# A node that fails ends the run on all; the same command with `--resume latest` continues it.
set -euo pipefail
: "${MASTER:?should name the host where the processes meet}"
: "${NODES:?should be the number of nodes}"
: "${GPUS:?should be the number of GPUs of a node}"
exec torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" \
  --rdzv_backend c10d --rdzv_endpoint "$MASTER:${PORT:-29500}" --rdzv_id "${RUN:-moa}" \
  --shutdown-timeout 300 \
  "$(dirname "$0")/../../scripts/train_sd.py" "$@"
