#!/usr/bin/env bash
# Runs the tests with coverage of training/. Creates the environment .venv first if none is active.
#   ./run_pytest.sh                        the quick ones
#   ./run_pytest.sh -m "not long"          the quick and the slow ones, as CI runs them
#   ./run_pytest.sh -m long                sweeps, soaks and full trainings
#   ./run_pytest.sh -n 0                   one at a time, as a debugger needs it; -n 8 on a machine with many cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. config/environment.sh requirements_dev.txt
# Two tests at a time, each with one thread: the small models of the tests lose more than they gain by a second one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered "$@"
