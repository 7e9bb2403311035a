"""A target on the Hugging Face Hub: a repository, filled in commits and compared with the Hub's own checksums.

The commits of hf://OWNER/MODEL, in order:

    publishing.json       names the run that is being uploaded; a run.json that is there is removed
    <each large file>     a commit each, so that an interrupted upload continues with the next file
    <the other files>     with manifest.json, in one commit
    run.json              and publishing.json is removed: a repository that has run.json is complete

Files travel by Git LFS, with Xet switched off: this is the way that the tests take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import RUN_FILE
from training.errors import PublishError, SourceError, text_of
from training.files import LARGE, digest, size_in_words
from training.storage.hub_requests import (
    SCHEME,
    TOKEN_ADVICE,
    Address,
    DifferentFilesError,
    find_token,
    retried,
    session,
)
from training.storage.source import source_digest
from training.storage.target import MARKER_FILE, without_secret

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)

TYPE = f"Type {SCHEME}OWNER/MODEL"
OTHER_KINDS = {"datasets": "a dataset", "spaces": "a Space", "buckets": "a bucket", "kernels": "a kernel"}
HUB_FILES = (".gitattributes",)  # the Hub makes it with the repository: it lists the files of Git LFS
# Seconds to wait for an answer. After a file of several parts, the Hub answers when it has put them together.
ASKING, SENDING = 10, 120
# Bytes from which a file gets a commit of its own. The Hub keeps files of that size in Git LFS.
OWN_COMMIT = 10 * 2**20


@dataclass
class Repository:
    """A model's repository as of the commit `head`. `name` is the target as typed."""

    address: Address
    private: bool = True
    head: str | None = None
    files: dict[str, RepoFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.address.name


def is_hub(target: str) -> bool:
    return target.lower().startswith(SCHEME)


def repository_id(target: str) -> str:
    """OWNER/MODEL of a target hf://OWNER/MODEL. Raises PublishError, without repeating a token."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    shown = without_secret(target)
    if shown != target or "@" in target:
        raise PublishError(f"{shown}: holds a token, or an '@' or '?'. {TYPE}. {TOKEN_ADVICE}")
    parts = target[len(SCHEME) :].strip("/").split("/")
    if parts[0] in OTHER_KINDS:
        raise PublishError(
            f"{target}: is {OTHER_KINDS[parts[0]]}, but a model's repository is needed. {TYPE}"
        )
    if len(parts) < 2:
        raise PublishError(f"{target}: names no model of an owner. {TYPE}")
    name = "/".join(parts[:2])
    if len(parts) > 2:
        raise PublishError(
            f"{target}: is a folder in a repository, but a model needs a repository of its own. "
            f"Type {SCHEME}{name}"
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"{target}: the Hub has no such names. {text_of(error)}") from error
    return name


def open_repository(target: str) -> Repository:
    """The repository with its files; a missing one is created, private. Raises PublishError."""
    repository = Repository(Address(target, repository_id(target), find_token(target)))
    with session(repository.address, "cannot be opened", ASKING):
        retried(repository.address, lambda: _open(repository))
    return repository


def _open(repository: Repository) -> None:
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        info = repository.address.api.model_info(repository.address.id)
    except RepositoryNotFoundError:
        try:
            repository.address.api.create_repo(repository.address.id, private=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:  # another process has just created it
                raise
        info = repository.address.api.model_info(repository.address.id)
    if info.id != repository.address.id:
        raise PublishError(
            f"{repository.name}: is called {info.id} on the Hub. Type {SCHEME}{info.id}, or another name"
        )
    repository.head, repository.private = info.sha, bool(info.private)
    _list(repository)


def _list(repository: Repository) -> None:
    from huggingface_hub.hf_api import RepoFile

    tree = repository.address.api.list_repo_tree(
        repository.address.id, recursive=True, revision=repository.head
    )
    repository.files = {
        entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path not in HUB_FILES
    }


def check_permission(repository: Repository) -> None:
    """Raises PublishError if the token may not write to the repository."""
    from huggingface_hub.errors import HfHubHTTPError

    with session(repository.address, "cannot be written", ASKING):
        try:
            repository.address.api.auth_check(repository.address.id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):  # with any other answer the first commit decides
                raise


def holds(repository: Repository, name: str, source: Path | bytes, expected: dict[str, Any]) -> bool:
    """Whether the repository has this file: the Hub's SHA-256 of a file of Git LFS, else its git checksum.

    `expected` is {"size": bytes, "sha256": hex} of the source.
    """
    from huggingface_hub.utils.sha import git_hash

    file = repository.files.get(name)
    if file is None or file.size != expected["size"]:
        return False
    if file.lfs is not None:
        return (file.lfs.size, file.lfs.sha256) == (expected["size"], expected["sha256"])
    return file.blob_id == git_hash(source if isinstance(source, bytes) else source.read_bytes())


def upload(
    repository: Repository,
    contents: Mapping[str, Path | bytes],
    digests: Mapping[str, dict[str, Any]],
    marker: bytes,
    check: Callable[[], Any],
) -> None:
    """Uploads what the repository lacks, run.json last, and compares the Hub's checksums of all files.

    Args:
        contents: source of each file of the model, run.json included.
        digests: {"size": bytes, "sha256": hex} of each file.
        marker: content of publishing.json.
        check: raises PublishError if the repository holds something else. It is called again before each try.
    """

    reopens = False

    def attempt() -> None:
        nonlocal reopens
        if reopens:
            _open(repository)  # a commit may have arrived although its answer was lost
            check()
        reopens = True
        try:
            _send(repository, contents, digests, marker)
        except DifferentFilesError:
            reopens = False  # the last commit is ours
            raise

    with session(repository.address, "cannot be written", SENDING):
        retried(repository.address, attempt)


def _send(
    repository: Repository,
    contents: Mapping[str, Path | bytes],
    digests: Mapping[str, dict[str, Any]],
    marker: bytes,
) -> None:
    def lacking(names: Mapping[str, Any]) -> dict[str, Path | bytes]:
        return {
            name: contents[name]
            for name in names
            if not holds(repository, name, contents[name], digests[name])
        }

    files = {name: source for name, source in contents.items() if name != RUN_FILE}
    marked = digest([marker])
    is_marked = holds(repository, MARKER_FILE, marker, marked)
    removed = [RUN_FILE] if RUN_FILE in repository.files else []  # an incomplete copy must not look complete
    if removed or not is_marked:
        _commit(
            repository,
            "Start of an upload",
            {} if is_marked else {MARKER_FILE: marker},
            {MARKER_FILE: marked},
            removed,
        )
    missing = lacking(files)
    large = {name: source for name, source in missing.items() if digests[name]["size"] >= OWN_COMMIT}
    for name, source in large.items():
        _commit(repository, name, {name: source}, digests)
    if small := {name: source for name, source in missing.items() if name not in large}:
        _commit(repository, "Configuration, tokenizer and model card", small, digests)
    _list(repository)
    _refuse_wrong(repository, list(lacking(files)))
    _commit(repository, "End of an upload", {RUN_FILE: contents[RUN_FILE]}, digests, [MARKER_FILE])
    _list(repository)
    _refuse_wrong(repository, list(lacking(contents)))


def remove_file(repository: Repository, name: str) -> None:
    with session(repository.address, "cannot be written", SENDING):
        _commit(repository, f"Removes {name}", {}, {}, [name])


def _refuse_wrong(repository: Repository, wrong: list[str]) -> None:
    if wrong:
        raise DifferentFilesError(
            f"{repository.name}: the Hub's checksums of {', '.join(wrong)} are not those of the files that were sent"
        )


def _commit(
    repository: Repository,
    message: str,
    added: Mapping[str, Path | bytes],
    digests: Mapping[str, dict[str, Any]],
    removed: list[str] | None = None,
) -> None:
    """Commits on top of `head`, so that nothing that another process has committed is overwritten."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    def check_sources() -> None:
        for name, source in added.items():
            if isinstance(source, Path) and source_digest(source) != digests[name]:
                raise SourceError(f"{source}: changed while it was copied")

    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in removed or []]
    start = time.monotonic()
    try:
        for name, source in added.items():
            operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=source))
            operations[-1].upload_info.sha256 = bytes.fromhex(digests[name]["sha256"])
        commit = repository.address.api.create_commit(
            repository.address.id, operations, commit_message=message, parent_commit=repository.head
        )
    except Exception:
        check_sources()
        raise
    check_sources()
    repository.head = commit.oid
    for name in added:
        if (size := digests[name]["size"]) >= LARGE:
            speed = size / 2**20 / max(time.monotonic() - start, 1e-9)
            logger.info("%s: %s at %.0f MiB/s", name, size_in_words(size), speed)
