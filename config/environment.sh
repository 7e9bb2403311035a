# Sourced by run_demo.sh, run_pytest.sh and .ci/run, at the root of the repository:
#   . config/environment.sh requirements.txt
# Leaves a Python on PATH that has exactly those requirements: the active environment if it does, else .venv,
# which is made, or brought up to date, when needed.

requirements=$1

fail() { printf '%s\n' "$@" >&2; exit 1; }

satisfied() {
    "$1" - "$requirements" 2>/dev/null <<'PY'
import re, sys
from importlib.metadata import version
def pins(path):
    for line in open(path):
        if line.startswith("-r "):
            yield from pins(line[3:].strip())
        elif match := re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", line):
            yield match.groups()
sys.exit(not all(version(name).split("+")[0] == pin for name, pin in pins(sys.argv[1])))
PY
}

if ! satisfied python; then
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
command -v g++ >/dev/null || command -v c++ >/dev/null \
    || fail "DeepSpeed needs a C++ compiler, and there is none." "Get it: sudo apt-get install g++ (Debian, Ubuntu), or xcode-select --install (Mac)."
python -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    || fail "DeepSpeed needs Python's C headers, and $(python --version) has none." "Get them: sudo apt-get install python3-dev"
command -v ninja >/dev/null || fail "ninja is not on PATH, though requirements.txt has it." "Get it: python -m pip install ninja"
