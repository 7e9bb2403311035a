"""Dolly as a Metaflow flow: start -> train -> end. It chooses options and runs the one command; see README, Metaflow.

    python flows/train_dolly_flow.py run                                      Dolly's run on this machine's GPUs
    python flows/train_dolly_flow.py run --gpu-family cpu                     the demo
    python flows/train_dolly_flow.py --datastore s3 --config-value machine 8xV100-32GB run --with kubernetes
    python flows/train_dolly_flow.py resume                                   goes on from the last checkpoint

Imports no torch at its top: every task and every refresh of a card starts this file anew.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import socket
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "training").is_dir() else HERE.parent  # in Metaflow's package all lies side by side
sys.path.insert(0, str(ROOT))

from model_on_s3 import NO_METAFLOW, StoreError, push, root_problems

try:
    import metaflow
    from metaflow import (
        Config,
        FlowSpec,
        IncludeFile,
        Parameter,
        config_expr,
        current,
        package_sources,
        resources,
        step,
    )
    from metaflow.exception import MetaflowException
    from metaflow.metaflow_config import DATATOOLS_S3ROOT
except ImportError:
    sys.exit(NO_METAFLOW)

import pod
from gpu_profile import gpu_profile

from training import consts
from training.consts import DEFAULT_INPUT_MODEL, DEFAULT_TRAINING_DATASET, DEMO, RUN_FILE, SAMPLE_INSTRUCTIONS
from training.data.demo_rows import demo_rows
from training.errors import MachineError, OptionsError, TrainingFailedError
from training.files import local_path, write_file
from training.launch.local import deepspeed_command, launch, typed
from training.machine.catalogue import FAMILIES, Machine
from training.machine.local import this_machine
from training.options.checks import option_problems
from training.options.command_line import GroupedCommand, click_options, option_words, value_problems
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.plan.fit import Plan, plan_run
from training.plan.presets import demo_options, preset_options
from training.run.preflight import place_problems, prompt_problems
from training.storage import metrics
from training.storage.copy import model_figures

# What a task on another machine needs beside this folder. requirements.txt is what training.checks compares with.
SOURCES = [ROOT / "training", ROOT / "config", ROOT / "requirements.txt"]
SUFFIXES = [".py", ".json", ".txt"]


class RunRefusedError(MetaflowException):
    """The run cannot be begun; the message has every reason and what to type."""

    headline = "Cannot train"

    def __init__(self, problems: list[str]):
        super().__init__("\n" + "\n".join(f"  - {fault}" for fault in problems))


class StepFailedError(MetaflowException):
    """Training, or the push of its model, has failed; the message says why, and how to go on."""

    headline = "The run can go on"

    def __init__(self, error: Exception):
        cure = f"When the cause is mended, type python flows/train_dolly_flow.py resume --origin-run-id {current.run_id}"
        super().__init__(f"{error}\n{cure}")


@package_sources([str(source) for source in SOURCES], suffixes=SUFFIXES)
class TrainDollyFlow(FlowSpec):
    """Fine-tunes a causal language model to follow instructions. The defaults are Dolly's run."""

    machine = Config(
        "machine",
        default_value="8xA100-40GB",
        parser=pod.parse_machine,
        plain=True,
        help="Machine of the train step on Kubernetes or Batch, by its name in training.plan, or cpu.",
    )
    asked = Config(
        "resources",
        default_value="{}",
        parser=pod.parse_resources,
        plain=True,
        help='What to ask for in place of what the plan says, as {"memory": 128000, "disk": 300000}, in MB.',
    )

    gpu_family = Parameter(
        "gpu-family",
        help=f"Recipe: {', '.join(FAMILIES)}. cpu is the demo on two ranks.  [default: the machine's]",
        type=str,
        default=None,
    )
    num_gpus = Parameter("num-gpus", help="GPUs, or ranks on a CPU.  [default: all]", type=int, default=None)
    input_model = Parameter(
        "input-model",
        help=f"Base model: a name on the Hub, a folder, or '{DEMO}'.  [default: {DEFAULT_INPUT_MODEL}]",
        type=str,
        default=None,
    )
    training_dataset = Parameter(
        "training-dataset",
        help=f"A name on the Hub, or '{DEMO}'.  [default: {DEFAULT_TRAINING_DATASET}]",
        type=str,
        default=None,
    )
    training_file = IncludeFile(
        "training-file",
        help="Rows of your own instead, .json, .jsonl, .csv or .parquet. Metaflow keeps a copy with the run.",
        is_text=False,
        default=None,
    )
    epochs = Parameter("epochs", help="Times to go through the rows.  [default: 1]", type=float, default=None)
    max_steps = Parameter("max-steps", help="Stop after so many steps, for a trial.", type=int, default=None)
    lr = Parameter("lr", help="Learning rate.  [default: Dolly's]", type=float, default=None)
    seed = Parameter("seed", help="Seed of split, order and new rows.", type=int, default=None)
    sample_prompts = IncludeFile(
        "sample-prompts",
        help="Instructions that the model answers as it trains: .txt, .json or .jsonl.  [default: Dolly's five]",
        is_text=False,
        default=None,
    )
    sample_every = Parameter(
        "sample-every",
        help="Steps (100) or epochs (0.5epochs) between two rounds of answers.  [default: 1epoch]",
        type=str,
        default=None,
    )
    local_training_root = Parameter(
        "local-training-root",
        help="Where the run's folder is made. On a cluster: storage that all pods share, or a resume begins anew."
        "  [default: ~/dolly_training]",
        type=str,
        default=None,
    )
    dbfs_output_root = Parameter(
        "dbfs-output-root",
        help="Where the finished model is copied as well: a folder or URL.",
        type=str,
        default=None,
    )
    trainer_options = Parameter(
        "trainer-options",
        help="Any other options of training.trainer, in one string: '--save-steps 50 --batching padded'.",
        type=str,
        default="",
    )

    @resources(memory=8000)  # it tokenises the rows
    @step
    def start(self) -> None:
        """Everything that can be refused is refused here, before a GPU is paid for."""
        remote = _is_remote()
        try:
            root = Path(self.local_training_root or "~/dolly_training").expanduser().absolute()
        except RuntimeError as error:  # ~nobody
            fault = f"--local-training-root {self.local_training_root}: {error}. Name a folder of your own"
            raise RunRefusedError([fault]) from error
        self.folder = str(root / f"dolly__{current.run_id}")
        self.output = f"{self.folder}/model"  # in resumed runs too, as this step is not run again
        problems = root_problems()
        if remote and not (DATATOOLS_S3ROOT or self.dbfs_output_root or self.local_training_root):
            problems.append(
                "the model would be lost with the pod. Configure METAFLOW_DATATOOLS_S3ROOT, or name a target with "
                "--dbfs-output-root, or shared storage with --local-training-root"
            )
        try:
            machine = (
                pod.pod_machine(self.machine, self.asked) if remote else this_machine(root, self.num_gpus)
            )
            self.ranks = self.num_gpus or machine.count
            self.cpu_ranks = self.ranks if machine.is_cpu else 0
            options = self._options(machine, remote)
        except (MachineError, OptionsError) as error:
            raise RunRefusedError(problems + getattr(error, "problems", [str(error)])) from error
        self.options = asdict(options)
        self._write_files()
        problems += prompt_problems(options)
        plan = self._plan(options, machine, problems)
        if not options.force:
            problems += plan.problems
            if plan.problems and remote:
                problems += filter(None, [pod.advice(plan, self.machine, self.asked)])
        if problems:
            raise RunRefusedError(problems)
        self.next(self.train)

    @gpu_profile(run_folder="output")
    @resources(
        cpu=config_expr("pod.resources(machine, resources)['cpu']"),
        gpu=config_expr("pod.resources(machine, resources)['gpu']"),
        memory=config_expr("pod.resources(machine, resources)['memory']"),
        disk=config_expr("pod.resources(machine, resources)['disk']"),
        shared_memory=config_expr("pod.resources(machine, resources)['shared_memory']"),
    )
    @step
    def train(self) -> None:
        """Runs the command, and leaves the model where it is safe."""
        # A kill ends the training with a checkpoint, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.host = socket.gethostname()
        self._write_files()
        defaults = {option.name: option.default for option in fields(TrainingOptions)}
        command = deepspeed_command(
            {name: value for name, value in self.options.items() if value != defaults[name]}, self.ranks
        )
        print(f"Running on {self.host}:\n  {typed(command)}", flush=True)
        try:
            launch(command, self.cpu_ranks)
        except TrainingFailedError as error:
            raise StepFailedError(error) from error
        finally:
            self.metrics = metrics.read(Path(self.output) / consts.METRICS_FILE)
            self.samples = metrics.read(Path(self.output) / consts.SAMPLES_FILE)
        self._keep_model()
        self.next(self.end)

    @step
    def end(self) -> None:
        """Says what came out, and how to use it."""
        losses = self.record["held_out_loss"]
        print(
            f"held-out loss {losses['before']:.4f} before, {losses['after']:.4f} after {self.record['steps']:,} steps\n"
            f"the model: {self.model['s3'] or self.output}"
        )
        folder = self.output
        if self.model["s3"]:
            folder = Path(self.output).parent.name
            print(f"fetch it:  python flows/model_on_s3.py {current.run_id} --to {folder}")
        print(f'ask it:    python -m training.generate --model {folder} "{SAMPLE_INSTRUCTIONS[0]}"')

    # --- what the steps do ---------------------------------------------------------------------------

    def _options(self, machine: Machine, remote: bool) -> TrainingOptions:
        """The trainer's options: the family's recipe, then Dolly's or the demo's, then what was asked.

        Raises OptionsError with all that is wrong, or MachineError.
        """
        family = self.gpu_family or machine.family
        problems = []
        if machine.is_cpu and family != "cpu":
            problems.append(
                f"--gpu-family {family}: {machine.name} has no GPU. Type --gpu-family cpu for the demo"
            )
        elif machine.is_cpu and not self.gpu_family and not remote:
            problems.append(
                "this machine has no GPU. Type --gpu-family cpu for the demo, or --with kubernetes after run"
            )
        elif remote and family != machine.family:
            problems.append(
                f"--gpu-family {family}: the pod was asked for as for {self.machine}. Leave it out, and name the machine: "
                "--config-value machine 8xV100-32GB before run"
            )
        if self.ranks > machine.count:
            problems.append(f"--num-gpus {self.ranks}: {machine.name} has {machine.count}")
        if self.training_file is not None and self.training_dataset:
            problems.append("--training-file and --training-dataset: give one of them")
        demo = family == "cpu" and self.input_model in (None, DEMO) and self.training_dataset in (None, DEMO)
        chosen = preset_options(family, self.ranks)
        # The demo saves nothing on its way, and here it shall be able to go on.
        chosen |= demo_options(self.ranks) | {"save_steps": 100} if demo else {"epochs": 1.0}
        asked = {
            "input_model": self.input_model,
            "training_dataset": self.training_dataset,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "lr": self.lr,
            "seed": self.seed,
            "local_output_dir": self.output,
            "dbfs_output_dir": self.dbfs_output_root
            and f"{self.dbfs_output_root.rstrip('/')}/{Path(self.folder).name}",
            "resume": "auto",
            "sample_every": self.sample_every,
        }
        self.prompts = self.sample_prompts or _dollys_prompts(demo)
        asked["sample_prompts"] = f"{self.folder}/prompts{_suffix(self.prompts, '.txt')}"
        if self.training_file is not None:
            asked["training_dataset"] = f"{self.folder}/rows{_suffix(self.training_file, '.csv')}"
        chosen |= {key: value for key, value in asked.items() if value is not None}
        try:
            options = _parsed(option_words(chosen), self.trainer_options)
        except OptionsError as error:
            raise OptionsError(*(problems + error.problems)) from error
        if options.local_output_dir != self.output:
            problems.append(
                "--local-output-dir is the flow's own. Name where its folder is made: --local-training-root"
            )
        problems += option_problems(options)
        if not remote:  # a pod has a disk of its own
            problems += [self._as_named_here(fault) for fault in place_problems(options)]
        if problems:
            raise OptionsError(*problems)
        return options

    def _as_named_here(self, fault: str) -> str:
        """A fault of the trainer's folders, by the options with which the flow was given their roots."""
        if self.dbfs_output_root:
            fault = fault.replace("--dbfs-output-dir", "--dbfs-output-root")
        return fault.replace("--local-output-dir", "--local-training-root")

    def _plan(self, options: TrainingOptions, machine: Machine, problems: list[str]) -> Plan:
        """Tokenises the rows, and weighs the run: artifacts `ledger` and `plan`.

        Raises RunRefusedError where model or rows cannot be used, with the `problems` so far.
        """
        import datasets
        import transformers

        from training.data.tokens import split_held_out
        from training.errors import DataError, ModelError
        from training.plan.epoch import lengths_of
        from training.plan.lookup import model_shape
        from training.plan.report import as_json, as_table
        from training.run.prepare import tokenised_rows

        datasets.disable_progress_bars()  # a bar that moves is many lines of a task's log
        transformers.utils.logging.disable_progress_bar()
        try:
            _, rows, ledger = tokenised_rows(options)
            split_held_out(rows, options.test_size, options.seed)
            lengths = lengths_of(options.training_dataset, rows["length"][:], rows["response_start"][:])
            best = FAMILIES[machine.family].precision
            settings = resolve(options, self.ranks, best)
            plan = plan_run(settings, lengths, model_shape(options.input_model), machine)
        except (DataError, ModelError, OptionsError) as error:
            raise RunRefusedError(problems + getattr(error, "problems", [str(error)])) from error
        self.ledger, self.plan = asdict(ledger), as_json(plan, price=None)
        print(f"{ledger}\n\n{as_table(plan, price=None)}", flush=True)
        return plan

    def _write_files(self) -> None:
        """The user's rows and prompts, where the command finds them: a pod has a disk of its own."""
        for option, content in (("sample_prompts", self.prompts), ("training_dataset", self.training_file)):
            file = Path(self.options[option])
            if content is None or file.parent != Path(
                self.folder
            ):  # one that --trainer-options name is there
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, content)

    def _keep_model(self) -> None:
        """The model on S3, where a root is configured, and then the artifacts `model`, `record` and `versions`."""
        folder = Path(self.output)
        self.model = {"folder": self.output, "host": self.host, "files": model_figures(folder), "s3": None}
        try:
            self.model["s3"] = push(folder, self.model["files"], self)
        except StoreError as error:
            where = f"The model in {self.output} on {self.host} is whole"
            if _is_remote():
                where += ", for as long as that folder is: a pod's own disk goes with the pod"
            raise StepFailedError(StoreError(f"{error}. {where}")) from error
        self.record = json.loads((folder / RUN_FILE).read_text())
        # Metaflow comes with the package of the flow, and has no metadata there.
        mine = {"metaflow": metaflow.__version__, "python": platform.python_version()}
        self.versions = self.record["versions"] | mine


def _is_remote() -> bool:
    """Whether this task runs in a pod, of Kubernetes or Batch."""
    return "METAFLOW_KUBERNETES_WORKLOAD" in os.environ or "AWS_BATCH_JOB_ID" in os.environ


def _suffix(content: bytes, otherwise: str) -> str:
    """By which ending the trainer reads a file, told from its first bytes: Metaflow keeps no file's name."""
    if content[:4] == b"PAR1":
        return ".parquet"
    first = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return {b"[": ".json", b"{": ".jsonl"}.get(first, otherwise)


def _dollys_prompts(demo: bool) -> bytes:
    """What is asked as the model trains, if nobody says what: Dolly's five, or some of the demo's rows."""
    if demo:
        asked = [
            {key: row[key] for key in ("instruction", "input")}
            for row in demo_rows()[:: len(demo_rows()) // 5]
        ]
    else:
        asked = [{"instruction": instruction} for instruction in SAMPLE_INSTRUCTIONS]
    return json.dumps(asked).encode()


def _parsed(words: list[str], more: str) -> TrainingOptions:
    """The trainer's options from words of its command line, the last of which counts. Raises OptionsError."""
    import click

    command = click.command(cls=GroupedCommand)(click_options(lambda **values: None))
    try:
        context = command.make_context("training.trainer", words + shlex.split(more))
    except (click.UsageError, ValueError) as error:  # an option that is none, a quote without an end
        reason = error.format_message() if isinstance(error, click.UsageError) else error
        raise OptionsError(f"--trainer-options {more!r}: {reason}") from error
    if value_problems(context):
        raise OptionsError(*value_problems(context))
    return _absolute(TrainingOptions(**context.params))


def _absolute(options: TrainingOptions) -> TrainingOptions:
    """With the paths that are there made absolute: the command does not run in the caller's folder."""
    found: dict[str, Any] = {}
    for name in ("input_model", "training_dataset", "sample_prompts", "deepspeed"):
        value = getattr(options, name)
        if value and value != DEMO and Path(value).expanduser().exists():
            found[name] = str(Path(value).expanduser().absolute())
    target = options.dbfs_output_dir
    if target and "://" not in target:
        found["dbfs_output_dir"] = str(local_path(target).absolute())
    return replace(options, **found)


if __name__ == "__main__":
    TrainDollyFlow()
