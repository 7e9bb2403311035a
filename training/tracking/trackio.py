"""Logs training to Trackio: its local store, or the Space or server that the environment names."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from training.consts import DEFAULT_PROJECT
from training.errors import install_extra
from training.files import writable
from training.options.trainer_options import TrainingOptions
from training.tracking.hide_secrets import without_secrets
from training.tracking.tracker import Entry, Service, log_rows, parameters

if TYPE_CHECKING:
    from trackio.run import Run

logger = logging.getLogger(__name__)


def problems(options: TrainingOptions) -> list[str]:
    """A package that is missing, or a store that cannot be written."""
    if find_spec("trackio") is None:
        return [
            f"trackio is not installed. Type {install_extra('trackio')}, or leave trackio out of --report-to"
        ]
    folder = os.environ.get("TRACKIO_DIR")
    if folder and not writable(Path(folder).expanduser()):
        return [f"TRACKIO_DIR {folder}: cannot be written. Name a folder of your own"]
    return []


def service(record: dict[str, Any], output: Path) -> Service:
    return Trackio(record, output)


class Trackio:
    """The Trackio run of a training run. Its name ends in the id of run.json, so that a resumed run continues it.

    Nothing leaves this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set. Trackio keeps what such a server
    does not take, and sends it when the next run starts. A resumed run sends only the steps after the newest one that
    Trackio has.
    """

    title = "Trackio"

    def __init__(self, record: dict[str, Any], output: Path) -> None:
        self.record, self.output = record, output
        self.run: Run | None = None
        self.last = -1  # the newest step that Trackio had at the start

    def attach(self) -> None:
        import trackio

        with warnings.catch_warnings(record=True) as caught:
            # Trackio raises nothing for a server that is away.
            warnings.simplefilter("always")
            self.run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
                name=f"{self.output.name}-{self.record['id'][:8]}",
                resume="allow",
                config=parameters(self.record),
                private=True,  # of a new Space; the answers may be of private rows
                embed=False,
                auto_log_cpu=False,
            )
        if caught:
            logger.warning("%s: %s", self.title, without_secrets(caught[0].message))
        self.last = self.run._next_step - 1

    def send(self, entries: list[Entry]) -> None:
        import trackio

        assert self.run is not None
        # Its table takes dicts as well.
        log_rows(self.run, entries, self.last, lambda answers: trackio.Table(data=cast(Any, list(answers))))

    def end(self, status: str) -> None:
        assert self.run is not None
        self.run.finish()
