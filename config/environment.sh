# Sourced by run_demo.sh, run_pytest.sh and .ci/run, at the root of the repository:
#   . config/environment.sh requirements.txt          with a second word, fresh: in an environment that is made anew
# Leaves a Python on PATH that has exactly those requirements: the active environment if it does, else .venv, or one in
# the user's cache where the path of this folder has a space. It is made, or brought up to date, when needed.

requirements=$1
fresh=${2:-}

fail() { printf '%s\n' "$@" >&2; exit 1; }

satisfied() {
    "$1" -c 'import sys; from training.machine.environment import mismatches; sys.exit(bool(mismatches(sys.argv[1])))' "$requirements" 2>/dev/null
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

has_space() { case $1 in *[[:space:]]*) ;; *) false ;; esac; }

# Sets `venv`. The deepspeed command names its Python in its first line, where a path may have no space.
choose_place() {
    local here checksum
    here=$(pwd -P)
    venv=.venv
    has_space "$here" || return 0
    checksum=$(printf %s "$here" | cksum)
    venv=${XDG_CACHE_HOME:-~/.cache}/dolly/${checksum%% *}/venv
    has_space "$venv" && fail "The path of this folder has a space, and so has that of the cache, $venv." \
        "An environment needs a path without. Type export XDG_CACHE_HOME=/a/folder/without/spaces"
    echo "The path of this folder has a space, so its environment is $venv"
}

make_environment() {
    local python
    for python in python3.12 python3.13 python3.11 python3 python ""; do
        new_enough "$python" && break
    done
    [ "$python" ] || fail "Python 3.11 or newer is needed, and was not found." \
        "Get it: sudo apt-get install python3.11-venv (Debian, Ubuntu), or brew install python@3.12 (Mac)."
    echo "Making the environment $venv ($("$python" --version)); this happens once."
    "$python" -m venv "$venv" || fail "No environment could be made." "Get its module: sudo apt-get install python3-venv"
}

install_requirements() {
    local pip="python -m pip"
    local -x PIP_DISABLE_PIP_VERSION_CHECK=1
    echo "Installing $requirements into $venv; this takes some minutes."
    # `uv venv` makes environments without pip.
    if ! python -c 'import pip' 2>/dev/null && ! python -m ensurepip >/dev/null 2>&1; then
        pip="uv pip"
        command -v uv >/dev/null || fail "$venv has no pip, and its Python brings none. Type rm -r $venv, and start again"
    fi
    $pip install --quiet -r "$requirements" || fail "The requirements could not be installed; the reason stands above."
}

if [ "$fresh" ] || ! satisfied python; then
    choose_place
    # venv writes activate last: without it the making was killed, and pip may be there by half.
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
