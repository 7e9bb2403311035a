#!/usr/bin/env bash
# Trains on one serverless GPU node of Databricks. The GPU_*.sh beside it start it with their command:
#   train.sh python -m training.trainer OPTIONS...
# Model and checkpoints go into the folder $DOLLY_VOLUME of a Volume, in a bundle the one in dist/volume.txt. A second
# start with the same folder continues its run, so a new run needs a new folder.
set -euo pipefail
cd "$CODE_SOURCE_PATH"
written=config/databricks/dist/volume.txt
if [ -z "${DOLLY_VOLUME:-}" ] && [ -f "$written" ]; then DOLLY_VOLUME=$(cat "$written"); fi
if [ -z "${DOLLY_VOLUME:-}" ]; then
    echo "DOLLY_VOLUME is not set, so model and checkpoints would be lost with the node. Set it to a new folder of a" \
        "Volume, such as /Volumes/main/default/dolly/first, under env_variables in the workload file" >&2
    exit 2
fi
if [ "${DOLLY_VOLUME#/}" = "$DOLLY_VOLUME" ]; then
    echo "DOLLY_VOLUME $DOLLY_VOLUME: is a folder on the node's own disk, and would be lost with the node. Type the full path" \
        "of a new folder of a Volume, such as /Volumes/main/default/dolly/first" >&2
    exit 2
fi
# The node's own disk. /local_disk0 is that of a cluster, and may be missing here.
disk=/local_disk0
if [ ! -w "$disk" ]; then disk=${TMPDIR:-/tmp}; fi
export HF_HOME=${HF_HOME:-$disk/huggingface}
# They describe the nodes. Our launcher sets its own for each rank.
unset WORLD_SIZE LOCAL_WORLD_SIZE RANK LOCAL_RANK NODE_RANK MASTER_ADDR MASTER_PORT
# peft is for --lora, at the version of the extra.
python -m pip install --quiet --disable-pip-version-check -r requirements.txt peft==0.21.2
exec "$@" \
    --local-output-dir "$disk/dolly_training/$(basename "$DOLLY_VOLUME")" \
    --dbfs-output-dir "$DOLLY_VOLUME/model" \
    --checkpoint-to "$DOLLY_VOLUME/checkpoints" \
    --resume auto
