#!/usr/bin/env bash
# Eight H100: every weight, as in Dolly.
exec bash "$CODE_SOURCE_PATH/config/databricks/train.sh" \
    python -m training.launch --num-gpus 8 -- --deepspeed config/ds_z3_bf16_config.json \
    --epochs 1 --per-device-train-batch-size 8 --gradient-accumulation-steps 1 "$@"
