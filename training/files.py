"""Files and folders: atomic writes, checksums, free space and paths. Imports none of our modules."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

DBFS = "/dbfs"
MOUNTS = (DBFS, "/Volumes")  # Databricks object stores: files are written sequentially and cannot be changed

# Names of temporary files and folders, which a killed process may leave behind.
PARTIAL = ".partial"  # suffix while a file or folder is being written
SCRATCH = ".dolly-"  # prefix of short-lived files and folders
WRITER_LOCK = ".writer.lock"
WRITER_INFO = ".writer.json"
WRITER_FILES = (WRITER_LOCK, WRITER_INFO)  # in the output folder, while a run writes into it

BLOCK = 2**23  # bytes per read
LARGE = 2**28  # smallest file with a progress bar, in bytes


# --- atomic writes ------------------------------------------------------------------------------------


def write_file(file: Path, content: str | bytes) -> None:
    """Replaces a file atomically by a rename. Text is written as UTF-8."""
    partial = file.with_name(f"{file.name}{PARTIAL}")
    with open(partial, "wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def write_json(file: Path, content: Any) -> None:
    """`write_file` with `content` as indented JSON."""
    write_file(file, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def write_folder(target: Path, is_complete: Callable[[Path], Any]) -> Iterator[Path]:
    """Yields an empty folder to fill, and renames it to `target` at the end, so that no reader sees a partial folder.

    `target` lies in a cache: if it exists by then, it is kept if it `is_complete`, and else replaced. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}{PARTIAL}-", dir=target.parent))
    try:
        yield partial
        try:
            os.replace(partial, target)
        except OSError:
            if not is_complete(target):
                shutil.rmtree(target)
                os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def fill_folder(target: Path, last: str) -> Iterator[Path]:
    """Yields an empty folder to fill, and moves what it holds to `target` at the end, the file `last` after all others.

    `target` is new or empty. Raises OSError; if another process has written to `target` meanwhile, its errno is
    ENOTEMPTY, and nothing of `target` is changed.
    """
    # An empty folder is filled where it is: it may be a mount point, or the current folder of a shell.
    exists = target.is_dir()
    parent = target if exists else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}{PARTIAL}-", dir=parent))
    try:
        yield partial
        if not exists:
            os.replace(partial, target)
            return
        if list(target.iterdir()) != [partial]:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- checksums ----------------------------------------------------------------------------------------


def read_blocks(stream: IO[bytes], size: int, label: str = "") -> Iterator[bytes]:
    """Reads a stream of `size` bytes in blocks. With a label, a large one shows a progress bar on a terminal."""
    from tqdm import tqdm

    hidden = None if label and size >= LARGE else True  # None: hidden unless on a terminal
    with tqdm(
        total=size, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=hidden
    ) as bar:
        while block := stream.read(BLOCK):
            yield block
            bar.update(len(block))


def digest(blocks: Iterable[bytes]) -> dict[str, Any]:
    """{"size": bytes, "sha256": hex} of the blocks."""
    size, checksum = 0, hashlib.sha256()
    for block in blocks:
        size += len(block)
        checksum.update(block)
    return {"size": size, "sha256": checksum.hexdigest()}


def file_digest(file: Path, label: str = "", flush: bool = False) -> dict[str, Any]:
    """`digest` of a file; `flush` calls fsync first. Raises OSError."""
    with file.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        return digest(read_blocks(stream, file.stat().st_size, label))


def fingerprint(*parts: Path | str) -> str:
    """Hash of 32 hexadecimal digits over the contents of these files (Path) and these texts (str)."""
    digests = [file_digest(part) if isinstance(part, Path) else digest([part.encode()]) for part in parts]
    return digest([json.dumps(digests).encode()])["sha256"][:32]


# --- space and paths ----------------------------------------------------------------------------------


def disk_problems(
    needs: Mapping[Path, int], labels: Mapping[Path, str], remedies: Mapping[Path, str] | None = None
) -> list[str]:
    """Reports file systems with too little free space.

    Args:
        needs: bytes that will be written below each path, which need not exist yet.
        labels: content of each path, such as {Path("/disk/out/checkpoints"): "2 checkpoints"}.
        remedies: what to type for each path, such as {Path("/disk/out/checkpoints"): "lower --save-total-limit"}.
    """
    by_device: dict[int, list[Path]] = {}
    for path in needs:
        by_device.setdefault(nearest_existing(path).stat().st_dev, []).append(path)
    problems = []
    for paths in by_device.values():
        needed, free = sum(needs[path] for path in paths), free_bytes(paths[0])
        if free is None or needed <= free:
            continue
        purposes = ", ".join(f"{size_in_words(needs[path])} for {labels[path]} ({path})" for path in paths)
        advice = dict.fromkeys(
            (remedies or {}).get(path, "use a larger disk") for path in paths if needs[path]
        )
        problems.append(
            f"{_mount_point(paths[0])} has {size_in_words(free)} free, but {size_in_words(needed)} are needed: {purposes}. "
            f"Free {size_in_words(needed - free)} there, or {', or '.join(advice)}"
        )
    return problems


def free_bytes(path: Path) -> int | None:
    """Free bytes of the file system of `path`, which need not exist yet.

    None if the reported values are implausible: mounted object stores report no size, or more free space than their
    size.
    """
    try:
        disk = os.statvfs(nearest_existing(path))
    except OSError:
        return None
    if disk.f_blocks <= 0 or not 0 <= disk.f_bavail <= disk.f_blocks:
        return None
    return disk.f_bavail * (disk.f_frsize or disk.f_bsize)


def nearest_existing(path: Path) -> Path:
    """`path`, or its nearest parent folder that exists and can be accessed."""
    path = path.absolute()
    while path != path.parent:
        with contextlib.suppress(OSError):
            if path.exists():
                return path
        path = path.parent
    return path


def writable(folder: Path) -> bool:
    """Whether `folder` can be created or written. Tries to create a folder in it or its nearest existing parent.

    Permissions are not sufficient: root has them all, even where NFS or /proc refuse to create anything.
    """
    try:
        if any(part.is_symlink() and not part.exists() for part in (folder, *folder.parents)):
            return False  # a dangling link: nothing can be created there
        trial = nearest_existing(folder) / f"{SCRATCH}trial-{os.getuid()}"
        # A fixed name, so that the next check removes the leftover of a killed one; one per user, because another
        # user's folder in /tmp could not be removed. Ranks run this at the same time.
        with contextlib.suppress(FileExistsError):
            trial.mkdir()
        with contextlib.suppress(FileNotFoundError):
            trial.rmdir()
    except OSError:
        return False
    return True


def can_write(file: Path) -> bool:
    """Whether `write_file` can write this file: its folder exists and is writable, and it is no folder itself."""
    folder = file.absolute().parent
    return folder.is_dir() and writable(folder) and not file.is_dir()


def _mount_point(path: Path) -> Path:
    path = nearest_existing(path).resolve()
    while path != path.parent and path.parent.stat().st_dev == path.stat().st_dev:
        path = path.parent
    return path


def size_in_words(count: int) -> str:
    """Bytes as "12.3 GiB", or as MiB below 0.1 GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


def local_path(folder: str) -> Path:
    """The local path of a folder as typed by a user: dbfs:/x becomes /dbfs/x, ~ is expanded."""
    return Path(re.sub("^dbfs:/*", f"{DBFS}/", folder)).expanduser()


# What an option names. A model or a dataset may also be a name on the Hub, a target a URL. A source is a file that exists.
PathKind = Literal["model", "dataset", "source", "file", "folder", "checkpoint", "output", "target"]
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HUB_PAGE = re.compile(r"(?:https?://(?:www\.)?huggingface\.co|hf:/)/(?:datasets/)?([\w.-]+/[\w.-]+)")
_INSTEAD: dict[PathKind, str] = {
    "model": "Name a folder with config.json, or a model on the Hub",
    "dataset": "Name a file, a folder of files, or a dataset on the Hub",
    "source": "Name a file on this machine",
    "file": "Name a file on this machine",
    "folder": "Name a folder on this machine",
    "checkpoint": "Type never, auto, or the folder of a checkpoint",
    "output": "Name a folder of your own",
    "target": "Name a folder of your own",
}


def expanded(path: str) -> str:
    """A typed path with ~ replaced by the home folder; unchanged if there is none. A shell leaves --option=~/x as it is."""
    return os.path.expanduser(path) if path.startswith("~") and "\0" not in path else path


def path_problem(path: str, kind: PathKind) -> str | None:
    """Why a typed path cannot be used, with what to type instead; None if it can.

    It asks whether a file or folder can have this name. Only a model, a source and a folder must exist: other files are
    read later, by readers that say more.
    """
    path, reason = expanded(path), None
    if "\0" in path:
        return f"holds a null byte. {_INSTEAD[kind]}"
    if path.startswith("~"):
        return f"there is no user {path[1:].split('/')[0]!r}. {_INSTEAD[kind]}"
    if URL.match(path):
        return _url_problem(path, kind)
    try:
        is_folder = Path(path).is_dir()
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            reason = f"cannot be used ({error.strerror})"
        elif kind == "folder" or (kind == "model" and not is_hub_name(path)):
            reason = "no such folder"
        elif kind == "source":
            reason = "no such file"
    else:
        if is_folder and kind in ("source", "file"):
            reason = "is a folder, but a file is needed"
        elif not is_folder and kind in ("model", "folder", "output"):
            reason = "is a file, but a folder is needed"
    return f"{reason}. {_INSTEAD[kind]}" if reason else None


def _url_problem(url: str, kind: PathKind) -> str | None:
    if kind == "target":
        return None
    page = HUB_PAGE.match(url)
    if page and kind in ("model", "dataset"):
        return f"is a {'URL' if url.startswith('hf:') else 'web page'}. Type {page[1]}"
    if kind == "output":
        return (
            "is a URL. Training needs a local disk, and the finished model can be copied to the URL. "
            f"{_INSTEAD[kind]}"
        )
    return f"is a URL. {_INSTEAD[kind]}"


def split_sources(text: str) -> tuple[str, ...]:
    """The datasets in a text with commas between them, as a notebook's widget and a flow's parameter have it.

    A path that exists may hold commas: the longest such path counts. Empty parts are left out, unless nothing else is
    there.
    """
    parts, sources = text.split(","), []
    while parts:
        texts = [",".join(parts[:end]).strip() for end in range(len(parts), 0, -1)]
        source = next(filter(path_exists, texts), texts[-1])
        sources.append(source)
        del parts[: len(parts) - texts.index(source)]
    return tuple(filter(None, sources)) or (text.strip(),)


def path_exists(text: str) -> bool:
    """Whether the text is the path of a file or folder that exists."""
    try:
        return bool(text) and local_path(text).exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, an unknown ~user, a null byte
        return False


def is_hub_name(name: str) -> bool:
    """Whether a model or a dataset on the Hub can have this name: NAME or OWNER/NAME."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name, re.ASCII))


def mounted_store(path: Path) -> Path | None:
    """/dbfs or /Volumes if `path` is below one of them, else None."""
    top = Path(*path.parts[:2])
    return top if str(top) in MOUNTS else None


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
