#!/bin/bash
# The same command on each of several machines that see one folder. The first one is HEAD; the others find it.
#
#     HEAD=node1 MACHINES=4 OUT=/shared/runs/135m bash examples/launch/several_machines.sh
set -eu

exec torchrun \
    --nnodes "$MACHINES" --nproc-per-node gpu \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "$OUT" \
    --max-restarts 3 \
    -m smolforge train smollm2-135m --tokens 10B --out "$OUT" "$@"
