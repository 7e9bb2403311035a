#!/usr/bin/env bash
# One H100 with 80 GB: adapters of rank 16. All weights of GPT-J-6B do not fit.
exec bash "$CODE_SOURCE_PATH/config/databricks/train.sh" \
    python -m training.trainer --lora 16 \
    --epochs 1 --per-device-train-batch-size 16 --gradient-accumulation-steps 4 "$@"
