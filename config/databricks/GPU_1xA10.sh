#!/usr/bin/env bash
# One A10 with 24 GB: adapters of rank 16 on the frozen base model.
exec bash "$CODE_SOURCE_PATH/config/databricks/train.sh" \
    python -m training.trainer --lora 16 \
    --epochs 1 --per-device-train-batch-size 16 --gradient-accumulation-steps 4 "$@"
