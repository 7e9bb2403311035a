#!/usr/bin/env bash
# Runs the tests with coverage of training/. Creates the environment .venv first if none is active.
#   ./run_pytest.sh                        the quick ones
#   ./run_pytest.sh -m "not long"          the quick and the slow ones, as CI runs them
#   ./run_pytest.sh -m long                sweeps, soaks and full trainings
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. config/environment.sh requirements_dev.txt
exec python -m pytest --cov --cov-report=term:skip-covered "$@"
