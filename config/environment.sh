# Activates an environment with exactly the given requirements. run_demo.sh, run_pytest.sh and .ci/run source it at the
# root of the repository:
#   . config/environment.sh requirements.txt          a second argument, fresh, creates the environment again
# Uses the active environment if it meets the requirements, else .venv, or a folder in the user's cache if the path of
# this folder has a space. Creates or updates that environment if needed.

requirements=$1
fresh=${2:-}

fail() { printf '%s\n' "$@" >&2; exit 1; }

satisfied() {
    "$1" -c 'import sys; from training.machine.environment import mismatches; sys.exit(bool(mismatches(sys.argv[1])))' "$requirements" 2>/dev/null
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

has_space() { case $1 in *[[:space:]]*) ;; *) false ;; esac; }

# Sets `venv`. Its path must not have a space: the first line of the deepspeed command is the path of Python.
choose_venv() {
    local here checksum
    here=$(pwd -P)
    venv=.venv
    has_space "$here" || return 0
    checksum=$(printf %s "$here" | cksum)
    venv=${XDG_CACHE_HOME:-~/.cache}/dolly/${checksum%% *}/venv
    has_space "$venv" && fail "The path of this folder has a space, and so does the path of the cache, $venv." \
        "An environment needs a path without spaces. Type export XDG_CACHE_HOME=/a/folder/without/spaces"
    echo "The path of this folder has a space, so its environment is $venv"
}

make_environment() {
    local python
    for python in python3.12 python3.13 python3.11 python3 python ""; do
        new_enough "$python" && break
    done
    [ "$python" ] || fail "Python 3.11 or newer was not found." \
        "Type sudo apt-get install python3.11-venv (Debian, Ubuntu), or brew install python@3.12 (Mac)."
    echo "Creating the environment $venv ($("$python" --version)); only the first start does this."
    "$python" -m venv "$venv" || fail "The environment $venv could not be created." "Type sudo apt-get install python3-venv"
}

install_requirements() {
    local pip="python -m pip"
    local -x PIP_DISABLE_PIP_VERSION_CHECK=1
    echo "Installing $requirements into $venv; this takes a few minutes."
    # `uv venv` creates environments without pip.
    if ! python -c 'import pip' 2>/dev/null && ! python -m ensurepip >/dev/null 2>&1; then
        pip="uv pip"
        command -v uv >/dev/null || fail "$venv has no pip, and its Python cannot install it. Type rm -r $venv, and start again"
    fi
    $pip install --quiet -r "$requirements" || fail "$requirements could not be installed: see the reason above."
}

if [ "$fresh" ] || ! satisfied python; then
    choose_venv
    # venv writes activate last: if it is missing, the creation was killed and pip may be incomplete.
    if [ "$fresh" ] || { [ -f "$venv/pyvenv.cfg" ] && [ ! -s "$venv/bin/activate" ]; }; then
        rm -rf "$venv"
    fi
    [ -x "$venv/bin/python" ] || make_environment
    . "$venv/bin/activate"
    satisfied python || install_requirements
fi

# DeepSpeed compiles small C++ operators at their first use.
problems=$(python -c 'from training.machine.environment import tool_problems; print(*tool_problems(), sep="\n")')
[ -z "$problems" ] || fail "$problems"
