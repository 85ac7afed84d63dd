#!/usr/bin/env bash
# Prune a model to 2:4, verify the checkpoint, measure it, and say how to serve it.
#
#   examples/quickstart.sh ./SmolLM2-135M-Instruct calibration.txt held_out.txt ./sparse
#
# It prunes with `--effort low`. More arguments are options of `permllm-offline prune`, for example
# --values int8, or --effort default for twice the time, or --effort high for eight times.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: $0 MODEL CALIBRATION_TEXT HELD_OUT_TEXT OUTPUT [option of prune ...]" >&2
  exit 2
fi
model=$1 calibration=$2 held_out=$3 output=$4
shift 4

permllm-offline prune "$model" --output "$output" --dataset "$calibration" --effort low "$@"
permllm-offline inspect "$output" --verify
for measured in "$model" "$output"; do
  permllm-offline eval "$measured" --dataset "$held_out" --max-windows 16
done
echo "Serve it with the line that its model card has: $output/README.md"
