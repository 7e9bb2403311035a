#!/usr/bin/env bash
# A small GPT-J learns to follow instructions on this machine, under DeepSpeed ZeRO-3, and shows what it learned.
# Makes the environment .venv first if none is active. Arguments go to training.demo (--help lists them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. config/environment.sh requirements.txt
exec python -m training.demo "$@"
