#!/usr/bin/env bash
# Packs the code of the trainer job into config/databricks/dist/code.tgz, for `databricks bundle deploy`.
#   bash config/databricks/pack.sh /Volumes/main/default/dolly/first     at the root of the repository
# The archive has one folder at its top, which the job finds as $CODE_SOURCE_PATH. It holds what train.sh needs, also
# changes that are not committed, and the Volume's folder in volume.txt.
set -euo pipefail
volume=$1
dist=config/databricks/dist
mkdir -p "$dist"
printf '%s\n' "$volume" > "$dist/volume.txt"
name=$(basename "$PWD")
tar -C .. --exclude __pycache__ --exclude '*.tgz' -czf "$dist/code.tgz" \
    "$name/training" "$name/config" "$name/requirements.txt"
