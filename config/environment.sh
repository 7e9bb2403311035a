# Sourced by run_demo.sh, run_pytest.sh and .ci/run, at the root of the repository:
#   . config/environment.sh requirements.txt
# Leaves a Python on PATH that has exactly those requirements: the active environment if it does, else .venv,
# which is made, or brought up to date, when needed.

requirements=$1

fail() { printf '%s\n' "$@" >&2; exit 1; }

satisfied() {
    "$1" -c 'import sys; from training.machine.environment import mismatches; sys.exit(bool(mismatches(sys.argv[1])))' "$requirements" 2>/dev/null
}

if ! satisfied python; then
    # venv writes activate last: without it the making was killed, and pip may be there by half.
    if [ -x .venv/bin/python ] && [ -f .venv/pyvenv.cfg ] && [ ! -s .venv/bin/activate ]; then
        rm -r .venv
    fi
    if [ ! -x .venv/bin/python ]; then
        python=$(command -v python3.12 || command -v python3.13 || command -v python3.11 || command -v python3 || true)
        for candidate in "${python:-}" python3 python; do
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate && break
        done
        "${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
            || fail "Python 3.11 or newer is needed, and was not found." "Get it: sudo apt-get install python3.11-venv (Debian, Ubuntu), or brew install python@3.12 (Mac)."
        echo "Making the environment .venv ($("$python" --version)); this happens once."
        "$python" -m venv .venv || fail "No environment could be made." "Get its module: sudo apt-get install python3-venv"
    fi
    . .venv/bin/activate
    if ! satisfied python; then
        echo "Installing $requirements into .venv; this takes some minutes."
        python -m pip install --quiet --disable-pip-version-check -r "$requirements" \
            || fail "The requirements could not be installed; pip's reason stands above."
    fi
fi

# DeepSpeed compiles small C++ operators at their first use.
problems=$(python -c 'from training.machine.environment import tool_problems; print(*tool_problems(), sep="\n")')
[ -z "$problems" ] || fail "$problems"
