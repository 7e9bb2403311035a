"""config/environment.sh brings an environment of venv, uv or conda that works, or says what to type."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.machine.test_checks import executable

ROOT = Path(__file__).parents[2]


def sourcing(path: Path, interpreter: str, programs: str, needed: Path | str, then: str) -> dict[str, Any]:
    """Arguments of subprocess: sources config/environment.sh with only `interpreter` and `programs` on PATH."""
    executable(path / interpreter, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("bash", *programs.split()):
        (path / name).symlink_to(shutil.which(name))
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(path)}
    script = f"set -euo pipefail; . config/environment.sh $0; {then}"
    return {"args": ["bash", "-c", script, str(needed)], "env": environment}


def test_the_scripts_refuse_to_start_without_a_compiler(tmp_path: Path) -> None:
    needed = tmp_path / "requirements.txt"
    needed.write_text(f"click=={importlib.metadata.version('click')}\n")
    script = sourcing(tmp_path / "bin", "python", "ninja", needed, "echo ready")
    result = subprocess.run(**script, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "a C++ compiler, c++, is not on PATH" in result.stderr
    assert "ready" not in result.stdout
    executable(tmp_path / "bin" / "c++")
    result = subprocess.run(**script, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "ready\n"), result.stderr


def checkout_script(checkout: Path, *words: str, **variables: str) -> dict[str, Any]:
    """Arguments of subprocess: sources environment.sh in a checkout without an active environment, and prints pip's path."""
    path = checkout.parent / "bin"
    if not checkout.exists():
        checkout.mkdir()
        for name in ("config", "training"):
            (checkout / name).symlink_to(ROOT / name)
        (checkout / "requirements.txt").touch()
        executable(path / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # but no python
        executable(path / "c++")
        for name in ("bash", "ninja", "rm", "uname", "cksum", "basename"):
            (path / name).symlink_to(shutil.which(name))
    code = 'set -euo pipefail; . config/environment.sh requirements.txt "$@"; python -m pip --version'
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(path)}
    return {"args": ["bash", "-c", code, "-", *words], "cwd": checkout, "env": environment | variables}


def test_an_environment_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    checkout = tmp_path / "repository"
    with subprocess.Popen(**checkout_script(checkout), start_new_session=True) as first:
        while not list(checkout.glob(".venv/lib/*/site-packages/pip")):  # activate comes after pip
            assert first.poll() is None
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
    assert not (checkout / ".venv" / "bin" / "activate").exists()
    result = subprocess.run(**checkout_script(checkout), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert str(checkout / ".venv") in result.stdout


def test_a_checkout_with_a_space_in_its_path_gets_an_environment_without(tmp_path: Path) -> None:
    checkout, cache = tmp_path / "with a space", tmp_path / "cache"
    result = subprocess.run(
        **checkout_script(checkout, XDG_CACHE_HOME=str(cache)), capture_output=True, text=True, umask=0o077
    )
    assert (result.returncode, result.stderr) == (0, "")
    [venv] = cache.glob("dolly/*/venv")
    assert result.stdout.startswith(
        f"The path of this folder has a space, so its environment is {venv}\nCreating the"
    )
    assert str(venv / "lib") in result.stdout.splitlines()[-1]
    result = subprocess.run(
        **checkout_script(checkout, XDG_CACHE_HOME=str(checkout)), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Type export XDG_CACHE_HOME=/a/folder/without/spaces" in result.stderr
    assert not list(checkout.glob("dolly"))


def test_an_environment_of_uv_without_pip_gets_pip(tmp_path: Path) -> None:
    pip = pytest.importorskip("ensurepip").version()
    start = checkout_script(checkout := tmp_path / "repository")
    (checkout / "requirements.txt").write_text(f"pip=={pip}\n")  # bundled, so no network is needed
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    result = subprocess.run(**start, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(checkout / ".venv") in result.stdout.splitlines()[-1]


def test_a_fresh_environment_replaces_the_old_one(tmp_path: Path) -> None:
    start = checkout_script(checkout := tmp_path / "repository", "fresh")
    executable(checkout / ".venv" / "bin" / "python")
    executable(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1\n")  # so that no environment is created
    result = subprocess.run(**start, capture_output=True, text=True)
    assert "Python 3.11 or newer was not found" in result.stderr
    assert not (checkout / ".venv").exists()


# Python without ensurepip, as Debian's without python3-venv; uv, with this Python.
NO_ENSUREPIP = f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"\n'
UV = f"""#!/bin/sh
echo "uv $*" >&2
for last; do :; done
[ "$1" = pip ] || exec "{sys.executable}" -m venv --without-pip "$last"
"""


def with_uv(checkout: Path, **variables: str) -> dict[str, Any]:
    """Arguments of subprocess: `checkout_script` where only uv can make environments. Prints the environment's path."""
    start = checkout_script(checkout, **variables)
    executable(checkout.parent / "bin" / "python3", NO_ENSUREPIP)
    executable(checkout.parent / "bin" / "uv", UV)
    start["args"][2] = start["args"][2].replace("python -m pip --version", 'echo "$VIRTUAL_ENV"')
    return start | {"capture_output": True, "text": True}


def test_uv_makes_the_environment_and_installs_where_python_cannot(tmp_path: Path) -> None:
    start = with_uv(checkout := tmp_path / "repository")
    result = subprocess.run(**start)
    assert result.stdout.splitlines()[-1] == str(checkout / ".venv"), result.stderr
    assert result.stderr == "uv venv --quiet --python python3 .venv\n"
    (checkout / "requirements.txt").write_text("no-such-package==1.0\n")
    # The environment's Python has an ensurepip here, so it is taken away as well.
    real = checkout / ".venv" / "bin" / "python"
    real.unlink()
    executable(real, "#!/bin/sh\ncase $* in *pip*) exit 1;; esac\n" + f'exec "{sys.executable}" "$@"\n')
    result = subprocess.run(**start)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "uv pip install --quiet -r requirements.txt\n"
    (tmp_path / "bin" / "uv").unlink()
    result = subprocess.run(**start)
    assert result.returncode == 1
    assert (
        ".venv has no pip, and its Python cannot install it. Type rm -r .venv, and start again"
        in result.stderr
    )


def test_an_environment_that_cannot_work_is_made_again_or_reported(tmp_path: Path) -> None:
    start = with_uv(checkout := tmp_path / "repository")
    venv, made = checkout / ".venv", "uv venv --quiet --python python3 .venv\n"
    assert subprocess.run(**start).stderr == made
    assert subprocess.run(**start).stderr == "", "it is used again"

    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(tmp_path / "python3.12-that-was-removed")
    result = subprocess.run(**start)
    assert (result.returncode, result.stderr) == (0, made)
    assert "The environment .venv cannot be used, because its Python was removed." in result.stdout

    checkout.rename(tmp_path / "moved")
    result = subprocess.run(**with_uv(tmp_path / "moved"))
    assert (result.returncode, result.stderr) == (0, made)
    assert "The environment .venv cannot be used, because its folder was moved." in result.stdout
    assert result.stdout.splitlines()[-1] == str(tmp_path / "moved" / ".venv")

    old = tmp_path / "moved" / ".venv" / "bin" / "python"
    old.unlink()
    executable(old, '#!/bin/sh\n[ "$1" != --version ] || echo Python 3.9.18\nexit 1\n')
    result = subprocess.run(**with_uv(tmp_path / "moved"))
    assert result.returncode == 1
    assert ".venv has Python 3.9.18, but 3.11 or newer is needed.\nType rm -r .venv, and" in result.stderr
    shutil.rmtree(old.parents[1])
    old.parents[1].symlink_to(tmp_path / "nothing")
    result = subprocess.run(**with_uv(tmp_path / "moved"))
    assert result.stderr == ".venv is no folder. Type rm .venv, and start again\n"


def test_a_checkout_that_cannot_be_written_gets_its_environment_in_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    start = with_uv(checkout := tmp_path / "repository", XDG_CACHE_HOME=str(cache))
    bind = f"mount --bind {checkout} {checkout} && mount -o remount,ro,bind {checkout}"
    if subprocess.run(["bash", "-c", bind], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        result = subprocess.run(**start)
    finally:
        subprocess.run(["umount", checkout], check=True)
    assert result.returncode == 0, result.stderr
    [venv] = cache.glob("dolly/*/venv")
    assert result.stdout.startswith(f"This folder cannot be written, so its environment is {venv}\n")


def test_an_active_environment_of_conda_is_used_like_one_of_venv(tmp_path: Path) -> None:
    start = with_uv(checkout := tmp_path / "repository", CONDA_PREFIX=str(tmp_path), VIRTUAL_ENV="none")
    executable(tmp_path / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    result = subprocess.run(**start)
    assert (result.returncode, result.stdout, result.stderr) == (0, "none\n", "")
    assert not (checkout / ".venv").exists()
