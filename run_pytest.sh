#!/usr/bin/env bash
# Runs the tests with coverage of training/. Creates the environment .venv first if none is active.
#   ./run_pytest.sh                        the quick ones
#   ./run_pytest.sh -m "slow or not slow"  all of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. config/environment.sh requirements_dev.txt
exec python -m pytest --cov --cov-report=term:skip-covered "$@"
