"""Logs training to Weights & Biases: one run across resumes, with the sample answers as a table."""

from __future__ import annotations

import logging
import os
import shlex
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import DEFAULT_PROJECT
from training.errors import install_extra
from training.options.trainer_options import TrainingOptions
from training.tracking.hide_secrets import reason, without_secrets
from training.tracking.tracker import Entry, Service, log_rows, parameters

if TYPE_CHECKING:
    from wandb import Run, Settings

logger = logging.getLogger(__name__)

INIT_SECONDS = 8.0  # for the server's first answer; W&B's default is 90
FINISH_SECONDS = 8.0  # for what is not uploaded yet at the end; W&B's default is without end
OFFLINE = "export WANDB_MODE=offline"
EXIT_CODES = {"FINISHED": 0, "KILLED": 255, "FAILED": 1}  # 255 is W&B's for a run that was interrupted


def problems(options: TrainingOptions) -> list[str]:
    """A package or an API key that is missing. Only the server knows whether a key is valid."""
    if find_spec("wandb") is None:
        return [f"wandb is not installed. Type {install_extra('wandb')}, or leave wandb out of --report-to"]
    problem = _key_problem()
    return [problem] if problem else []


def service(record: dict[str, Any], output: Path) -> Service:
    return Wandb(record, output)


def _key_problem() -> str | None:
    """Why W&B would ask for an API key on the terminal, and what to type."""
    import wandb
    from wandb.sdk.lib.wbauth import authenticate_session

    try:
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return None
        host = settings.base_url
        if authenticate_session(host=host, source="training", prompt=False, update_session=False):
            return None
    except Exception as error:  # a key or a setting of a wrong form
        return f"W&B refuses its settings ({without_secrets(error)}). Correct them, or type {OFFLINE}"
    return f"W&B has no API key for {without_secrets(host)}. Type export WANDB_API_KEY=KEY, wandb login, or {OFFLINE}"


class Wandb:
    """The W&B run of a training run. Its id is that of run.json, so that a resumed run continues it.

    W&B's own process sends, and writes everything into `output`/wandb as well. If the server does not answer at the
    start, the run is written there alone. W&B cannot change a step that it has, so a resumed run sends only the steps
    after the newest one.
    """

    title = "Weights & Biases"

    def __init__(self, record: dict[str, Any], output: Path) -> None:
        self.record, self.output = record, output
        self.run: Run | None = None
        self.last = -1  # the newest step that W&B had at the start

    def attach(self) -> None:
        import wandb

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to W&B, about errors of its package
        os.environ.setdefault("WANDB_SILENT", "true")
        wandb.teardown()  # ends the process of a failed attempt, which would still hold the run's id
        problem = _key_problem()
        try:
            if problem is not None:
                raise ValueError(problem)
            self.run = self._start(None)
        except Exception as error:  # no server, a key that it refuses, or any other answer
            wandb.teardown()
            self.run = self._start("offline")
            logger.warning(
                "%s does not answer (%s). Training continues. The run is written to a folder; to upload it, type %s",
                self.title,
                reason(error),
                self._sync_command(),
            )
        else:
            offline = f"offline. To upload the run later, type {self._sync_command()}"
            logger.info("%s: %s", self.title, offline if self.run.offline else self.run.url)
        self.last = self.run.step - 1

    def _start(self, mode: Any) -> Run:
        import wandb

        return wandb.init(
            mode=mode,
            id=self.record["id"],
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            name=os.environ.get("WANDB_NAME", self.output.name),
            dir=os.environ.get("WANDB_DIR", str(self.output)),
            config=parameters(self.record) | {name: self.record[name] for name in ("git_commit", "versions")},
            settings=self._settings(),
        )

    def _settings(self) -> Settings:
        import wandb

        own: dict[str, Any] = {
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
            "console": "off",  # stdout belongs to the supervisor, and may hold rows
            "silent": True,
            "disable_git": True,  # the address of a remote may hold a token
            "save_code": False,
        }
        return wandb.Settings(
            **{name: value for name, value in own.items() if f"WANDB_{name.upper()}" not in os.environ}
        )

    def _sync_command(self) -> str:
        folder = Path(self.run.dir).parent if self.run is not None else self.output / "wandb"
        return shlex.join(["wandb", "sync", str(folder)])

    def send(self, entries: list[Entry]) -> None:
        import wandb

        assert self.run is not None
        log_rows(
            self.run,
            entries,
            self.last,
            lambda answers: wandb.Table(
                columns=list[Any](answers[0]), data=[list(answer.values()) for answer in answers]
            ),
        )

    def end(self, status: str) -> None:
        import wandb

        assert self.run is not None
        try:
            self.run.finish(exit_code=EXIT_CODES[status])
        except TimeoutError:
            logger.warning(
                "%s did not take all figures within %.0f s. To upload the rest, type %s",
                self.title,
                FINISH_SECONDS,
                self._sync_command(),
            )
        finally:
            with suppress(Exception):
                wandb.teardown()  # otherwise the end of Python would wait for W&B's process
