"""Names of the sources of a run's rows: one or several values of `--training-dataset`. No source is read."""

from __future__ import annotations

from collections.abc import Sequence

from training.files import local_path


def sources_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """The sources that a run's record names: a list, or one string in records of earlier versions."""
    return (value,) if isinstance(value, str) else tuple(value)


def joined(value: str | Sequence[str]) -> str:
    """The sources as one text, for tables and trackers."""
    return ", ".join(sources_of(value))


def split_sources(text: str) -> tuple[str, ...]:
    """The sources in a text with commas between them, as a notebook's widget and a flow's parameter have it.

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
