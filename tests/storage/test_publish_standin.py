"""The stand-in for DBFS refuses what DBFS refuses, and only under the folder it is configured for."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import python

NAIVE = {
    "copy2": "shutil.copy2(source, folder / 'new')",
    "a rename to the final name": "(folder / 'x.partial').write_bytes(b'1'); os.replace(folder / 'x.partial', folder / 'x')",
    "append": "open(folder / 'old', 'ab')",
    "update": "open(folder / 'old', 'r+b')",
    "update from the front": "os.open(folder / 'old', os.O_WRONLY)",
    "truncating open": "open(folder / 'old', 'wb')",
    "read and write": "open(folder / 'new', 'w+b')",
    "seek back": "f = open(folder / 'new', 'wb'); f.write(b'12'); f.seek(0)",
    "seek past the end": "f = open(folder / 'new', 'wb'); f.seek(9)",
    "truncate": "os.truncate(folder / 'old', 1)",
    "ftruncate": "open(folder / 'new', 'wb').truncate(5)",
    "pwrite": "os.pwrite(new(), b'1', 5)",
    "fallocate": "os.posix_fallocate(new(), 0, 5)",
    "link": "os.link(folder / 'old', folder / 'new')",
    "link from outside": "os.link(source, folder / 'new')",
    "symlink": "os.symlink(source, folder / 'new')",
    "sendfile": "os.sendfile(new(), os.open(source, os.O_RDONLY), 0, 5)",
    "copy_file_range": "os.copy_file_range(os.open(source, os.O_RDONLY), new(), 5)",
    "chmod": "os.chmod(folder / 'old', 0o600)",
}


@pytest.mark.parametrize("statement", NAIVE.values(), ids=NAIVE)
def test_the_stand_in_refuses_what_dbfs_refuses(failing_disk: str, tmp_path: Path, statement: str) -> None:
    folder, source = tmp_path / "folder", tmp_path / "source"
    source.write_bytes(b"source")
    program = (
        "import os, shutil, pathlib\n"
        f"folder, source = pathlib.Path({str(folder)!r}), pathlib.Path({str(source)!r})\n"
        f"new = lambda: os.open(folder / 'new', os.O_WRONLY | os.O_CREAT)\n{statement}"
    )
    results = []
    for refuse in ("", str(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "old").write_bytes(b"old")
        environment = os.environ | {"LD_PRELOAD": failing_disk, "REFUSE_UNDER": refuse}
        results.append(python("-c", program, env=environment))
    assert results[0].returncode == 0, results[0].stderr
    assert results[1].returncode == 1
    assert re.search(r"Errno (1|22|95)\]", results[1].stderr), results[1].stderr
