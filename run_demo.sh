#!/usr/bin/env bash
# Trains a small GPT-J to follow instructions on this machine, under DeepSpeed ZeRO-3, and shows its answers.
# Creates the environment .venv first if none is active. Arguments are passed to training.demo (see --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. config/environment.sh requirements.txt
exec python -m training.demo "$@"
