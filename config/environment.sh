# Activates an environment with exactly the given requirements. run_demo.sh, run_pytest.sh and .ci/run source it at the
# root of the repository:
#   . config/environment.sh requirements.txt          a second argument, fresh, creates the environment again
# Uses the active environment (of venv, uv or conda) if it meets the requirements, else .venv, or a folder in the user's
# cache if .venv cannot be here. Creates or updates that environment if needed, with uv where Python has no pip.

requirements=$1
fresh=${2:-}

fail() { printf '%s\n' "$@" >&2; exit 1; }

satisfied() {
    "$1" -c 'import sys; from training.machine.environment import mismatches; sys.exit(bool(mismatches(sys.argv[1])))' "$requirements" 2>/dev/null
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

has() { command -v "$1" >/dev/null; }

has_space() { case $1 in *[[:space:]]*) ;; *) false ;; esac; }

# Whether .venv can be used in this folder: it is there and complete, or it can be written.
writable_here() { if [ -e .venv ]; then [ -w .venv ] || satisfied .venv/bin/python; else [ -w . ]; fi; }

# Sets `venv`. Its path must not have a space: the first line of the deepspeed command is the path of Python.
choose_venv() {
    local here checksum reason
    here=$(pwd -P)
    venv=.venv
    if has_space "$here"; then
        reason="The path of this folder has a space"
    elif ! writable_here; then
        reason="This folder cannot be written"
    else
        return 0
    fi
    checksum=$(printf %s "$here" | cksum)
    venv=${XDG_CACHE_HOME:-~/.cache}/dolly/${checksum%% *}/venv
    has_space "$venv" && fail "$reason, and the path of the cache, $venv, has a space." \
        "An environment needs a path without spaces. Type export XDG_CACHE_HOME=/a/folder/without/spaces"
    echo "$reason, so its environment is $venv"
}

make_environment() {
    local python
    for python in python3.12 python3.13 python3.11 python3 python ""; do
        new_enough "$python" && break
    done
    # Debian's Python has no ensurepip without python3-venv. uv can also fetch a Python.
    if has uv && ! { [ "$python" ] && "$python" -c 'import ensurepip' 2>/dev/null; }; then
        echo "Creating the environment $venv with uv; only the first start does this."
        uv venv --quiet --python "${python:-3.12}" "$venv" || fail "uv could not create the environment $venv: see above."
        return 0
    fi
    [ "$python" ] || fail "Python 3.11 or newer was not found." \
        "Type sudo apt-get install python3.11-venv (Debian, Ubuntu), or brew install python@3.12 (Mac)."
    echo "Creating the environment $venv ($("$python" --version)); only the first start does this."
    "$python" -m venv "$venv" || fail "The environment $venv could not be created." "Type sudo apt-get install python3-venv"
}

# Prints why an existing environment cannot work, if so.
broken() {
    # venv writes activate last: if it is missing, the creation was killed and pip may be incomplete.
    if [ -f "$venv/pyvenv.cfg" ] && [ ! -s "$venv/bin/activate" ]; then
        echo "its creation was interrupted"
    elif [ -L "$venv/bin/python" ] && [ ! -e "$venv/bin/python" ]; then
        echo "its Python was removed"
    elif [ -s "$venv/bin/activate" ] && ! (. "$venv/bin/activate"; [ "${VIRTUAL_ENV:-}" -ef "$venv" ]); then
        echo "its folder was moved"
    fi
}

install_requirements() {
    local pip="python -m pip"
    local -x PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0  # a user may have set it, and pip would fail
    echo "Installing $requirements into $venv; this takes a few minutes."
    # `uv venv` creates environments without pip.
    if ! python -c 'import pip' 2>/dev/null && ! python -m ensurepip >/dev/null 2>&1; then
        pip="uv pip"
        has uv || fail "$venv has no pip, and its Python cannot install it. Type rm -r $venv, and start again"
    fi
    $pip install --quiet -r "$requirements" || fail "$requirements could not be installed: see the reason above."
}

if [ "$fresh" ] || ! satisfied python; then
    choose_venv
    if [ -L "$venv" ] && [ ! -e "$venv" ] || { [ -e "$venv" ] && [ ! -d "$venv" ]; }; then
        fail "$venv is no folder. Type rm $venv, and start again"
    fi
    reason=$(broken)
    [ -z "$reason" ] || echo "The environment $venv cannot be used, because $reason."
    [ -z "$fresh$reason" ] || rm -rf "$venv"
    [ -x "$venv/bin/python" ] || make_environment
    new_enough "$venv/bin/python" || fail "$venv has $("$venv/bin/python" --version 2>&1), but 3.11 or newer is needed." \
        "Type rm -r $venv, and start again"
    . "$venv/bin/activate"
    satisfied python || install_requirements
fi

# DeepSpeed compiles small C++ operators at their first use.
problems=$(python -c 'from training.machine.environment import tool_problems; print(*tool_problems(), sep="\n")')
[ -z "$problems" ] || fail "$problems"
