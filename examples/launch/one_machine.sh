#!/bin/bash
# All GPUs of one machine. Ctrl-C or SIGTERM saves the run; the same command continues it.
#
#     bash examples/launch/one_machine.sh
set -eu

exec smolforge train smollm2-135m --tokens 10B --out "${OUT:-runs/135m}" "$@"
