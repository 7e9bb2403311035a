"""Dolly as a Metaflow flow: start -> train -> end. It runs the training command; see docs/metaflow.md.

    python flows/train_dolly_flow.py run                                      Dolly's run on this machine's GPUs
    python flows/train_dolly_flow.py run --gpu-family cpu                     the demo
    python flows/train_dolly_flow.py --datastore s3 --config-value machine 8xV100-32GB run --with kubernetes
    python flows/train_dolly_flow.py resume                                   continues from the last checkpoint

With --num-nodes it starts train_dolly_nodes_flow.py, because a flow of several nodes has another graph.

It does not import torch at module level, because every task and every refresh of a card runs this file again.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In Metaflow's package all files lie in one folder.
sys.path.insert(0, str(HERE if (HERE / "training").is_dir() else HERE.parent))

from model_on_s3 import NO_METAFLOW, StoreError, checkpoint_target, push, root_problems, use_metaflow_s3

try:
    import metaflow
    from metaflow import (
        Config,
        FlowSpec,
        IncludeFile,
        JSONType,
        Parameter,
        config_expr,
        current,
        resources,
        step,
    )
    from metaflow.metaflow_config import DATATOOLS_S3ROOT
except ImportError:
    sys.exit(NO_METAFLOW)

import pod
from flow_errors import RunRefusedError, StepFailedError
from flow_parameters import (
    changed_options,
    default_prompts,
    file_in_run,
    option,
    parse_options,
    runs_folder,
    several_nodes,
    typed_names,
)
from gpu_profile import gpu_profile

from training.consts import CONFIG, DEMO, INSTALLED, METRICS_FILE, ROOT, SAMPLE_INSTRUCTIONS, SAMPLES_FILE
from training.data.source_names import joined, sources_of
from training.errors import DataError, MachineError, ModelError, OptionsError, TrainingFailedError
from training.files import split_sources, write_file
from training.launch.local import deepspeed_command, shell_command
from training.launch.restart import DEFAULT_RESTARTS, launch
from training.machine.catalogue import FAMILIES, Machine
from training.machine.local import this_machine
from training.options.checks import option_problems
from training.options.command_line import option_words
from training.options.trainer_options import TrainingOptions, flag_of
from training.options.wording import FLOW, PARAMETERS, worded
from training.plan.fit import Plan, plan_files, plan_run
from training.plan.presets import demo_options, preset_options
from training.plan.request import checked_settings, model_of
from training.run.preflight import destination_problems, evaluation_problems, prompt_problems
from training.storage import metrics
from training.storage.copy import model_digests
from training.storage.record import finished_run
from training.storage.remote import store_problems

# Packaged for tasks on other machines. training.machine.environment reads requirements.txt.
# The package of an installed wheel has config/ inside, and the pins in its metadata.
SOURCES = [ROOT / "training", *([] if INSTALLED else [CONFIG, ROOT / "requirements.txt"])]
SUFFIXES = [".py", ".json", ".txt"]
NODES_FLOW = HERE / "train_dolly_nodes_flow.py"


@metaflow.package_sources([str(source) for source in SOURCES], suffixes=SUFFIXES)
class TrainDollyFlow(FlowSpec):
    """Fine-tunes a causal language model to follow instructions. The defaults are Dolly's run."""

    machine = Config(
        "machine",
        default_value="8xA100-40GB",
        parser=pod.parse_machine,
        plain=True,
        help="Machine of the train step on Kubernetes or Batch, by its name in training.plan, or cpu.",
    )
    requested = Config(
        "resources",
        default_value="{}",
        parser=pod.parse_resources,
        plain=True,
        help='Resources to request instead of the plan\'s, such as {"memory": 128000, "disk": 300000}, in MB.',
    )

    gpu_family = Parameter(
        "gpu-family",
        help=f"Recipe: {', '.join(FAMILIES)}. cpu is the demo on two ranks.  [default: the machine's]",
    )
    num_gpus = Parameter("num-gpus", type=int, help="GPUs of a node, or ranks on a CPU.  [default: all]")
    num_nodes = Parameter(
        "num-nodes", type=int, default=1, help="Nodes. Several have a flow of their own, which is started."
    )
    input_model = option("input_model")
    training_dataset = option("training_dataset")
    dataset_config = option("dataset_config")
    dataset_split = option("dataset_split")
    dataset_revision = option("dataset_revision")
    training_file = IncludeFile(
        "training-file",
        help="A file with your own rows: .json, .jsonl, .csv or .parquet, also in gzip or zstd. Metaflow keeps a copy with the run.",
        is_text=False,
    )
    test_size = option("test_size")
    epochs = option("epochs", "1")
    max_steps = option("max_steps")
    lr = option("lr", "Dolly's")
    seed = option("seed")
    lora = option("lora")
    lora_alpha = option("lora_alpha")
    lora_dropout = option("lora_dropout")
    lora_targets = option("lora_targets")
    quantize = option("quantize")
    sample_prompts = option("sample_prompts", "Dolly's five", IncludeFile, is_text=False)
    sample_every = option("sample_every")
    file_names = Parameter(
        "file-names",
        type=JSONType,
        default=typed_names,
        help="Names of --training-file and --sample-prompts in messages, in JSON.  [default: as they are typed]",
    )
    local_training_root = Parameter(
        "local-training-root",
        help="Folder in which the run's folder is made. On a cluster use storage that all pods share, or a resume starts at step 0."
        "  [default: ~/dolly_training]",
    )
    dbfs_output_root = Parameter("dbfs-output-root", help="Folder, URL or hf://OWNER to copy the model to.")
    restarts = Parameter(
        "restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        help="Most times that the training is started again after a kill.",
    )
    trainer_options = Parameter(
        "trainer-options",
        help="Other options of training.trainer, in one string: '--save-steps 50 --batching padded'.",
        default="",
    )

    @resources(memory=8000)  # it tokenises the rows
    @step
    def start(self) -> None:
        """Checks options, rows and plan before a GPU is paid for."""
        self._check()
        self.next(self.train)

    @gpu_profile(run_folder="output")
    @resources(**{key: config_expr(f"pod.resources(machine, resources)['{key}']") for key in pod.KEYS})
    @step
    def train(self) -> None:
        """Runs the training command and pushes the model to S3."""
        self._begin_training()
        self._write_files()
        command = deepspeed_command(changed_options(self.options), self.ranks)
        print(f"Running on {self.host}:\n  {shell_command(command)}", flush=True)
        try:
            launch(command, self.cpu_ranks, FLOW, self.restarts)
        except TrainingFailedError as error:
            raise StepFailedError(error) from error
        finally:
            self._keep_figures()
        self._keep_model()
        self.next(self.end)

    @step
    def end(self) -> None:
        """Prints the result and how to use the model."""
        losses, folder = self.record["held_out_loss"], shlex.quote(self.output)
        print(
            f"held-out loss {losses['before']:.4f} before, {losses['after']:.4f} after {self.record['steps']:,} steps\n"
            f"the model: {self.model['s3'] or self.output}"
        )
        if self.model["s3"]:
            folder = Path(self.folder).name
            print(f"fetch it:  python flows/model_on_s3.py {current.run_id} --to {folder}")
        print(f'ask it:    python -m training.generate --model {folder} "{SAMPLE_INSTRUCTIONS[0]}"')

    # --- helpers of the steps ---------------------------------------------------------------------------

    def _check(self) -> None:
        """Checks the run and chooses its folder, options and ranks. Raises RunRefusedError with every problem."""
        remote = pod.is_remote()
        self.names: dict[str, str] = {}  # of the user's files in the run's folder, as they were typed
        problems = root_problems()
        s3_works = not problems
        if remote and not (DATATOOLS_S3ROOT or self.dbfs_output_root or self.local_training_root):
            problems.append(
                "the model would be lost with the pod. Configure METAFLOW_DATATOOLS_S3ROOT, or name a target with "
                "--dbfs-output-root, or shared storage with --local-training-root"
            )
        use_metaflow_s3()
        try:
            root = runs_folder(self.local_training_root)
            self.folder = f"{root}/dolly__{current.run_id}"
            # A resumed run keeps both, because this step does not run again.
            self.output = f"{self.folder}/model"
            machine = (
                pod.pod_machine(self.machine, self.requested) if remote else this_machine(root, self.num_gpus)
            )
            self.ranks = self.num_gpus or machine.count  # of each node
            self.cpu_ranks = self.ranks if machine.is_cpu else 0
            problems += self._nodes_problems(machine, remote)
            self.all_ranks = self.ranks * max(1, self.num_nodes)
            if not remote:  # its nodes share this machine
                machine = replace(machine, count=machine.count * max(1, self.num_nodes))
            options = self._options(machine, remote, s3_works)
            self.options = asdict(options)
            self._write_files()
            problems += prompt_problems(options)
            plan = self._plan(options, machine)
        except (DataError, MachineError, ModelError, OptionsError) as error:
            reasons = error.problems if isinstance(error, OptionsError) else [str(error)]
            raise RunRefusedError(map(self._worded, problems + reasons)) from error
        if plan.problems and not options.force:
            problems += plan.problems
            if remote and (advice := pod.advice(plan, self.requested)):
                problems.append(advice)
        if problems:
            raise RunRefusedError(map(self._worded, problems))

    def _begin_training(self) -> None:
        # SIGTERM ends the training with a checkpoint, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.host = socket.gethostname()
        use_metaflow_s3()

    def _keep_figures(self) -> None:
        """Stores the artifacts `metrics` and `samples`, also of a run that failed."""
        self.metrics = metrics.read(Path(self.output) / METRICS_FILE)
        self.samples = metrics.read(Path(self.output) / SAMPLES_FILE)

    def _options(self, machine: Machine, remote: bool, s3_works: bool = True) -> TrainingOptions:
        """The trainer's options: the family's recipe, then Dolly's or the demo's, then the typed parameters.

        Raises OptionsError with every problem, or MachineError.
        """
        family = self.gpu_family or machine.family
        problems = self._machine_problems(machine, family, remote)
        demo = family == "cpu" and self.input_model in (None, DEMO)
        chosen = preset_options(family, self.all_ranks, lora=bool(self.lora))
        rows: dict[str, tuple[str, ...]] = {}
        if self.training_file is not None:
            rows["training_dataset"] = (self._own_file("training_file", self.training_file),)
        elif self.training_dataset is not None:
            rows["training_dataset"] = split_sources(self.training_dataset)
        chosen |= demo_options(self.all_ranks, *rows.get("training_dataset", ())) if demo else {"epochs": 1.0}
        typed = self.trainer_options or ""
        if demo and "--save-steps" not in typed and "--save-every" not in typed:
            chosen["save_every"] = "1min"  # the demo is short, but the flow must be able to resume it
        chosen |= {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None} | rows
        self.prompts = default_prompts(demo) if self.sample_prompts is None else self.sample_prompts
        chosen["sample_prompts"] = self._own_file("sample_prompts", self.prompts)
        target = self.dbfs_output_root  # an empty one is reported below
        chosen["dbfs_output_dir"] = target and f"{target.rstrip('/')}/{Path(self.folder).name}"
        chosen["checkpoint_to"] = checkpoint_target(current.flow_name, current.run_id)
        words = option_words(chosen | {"local_output_dir": self.output, "resume": "auto"})
        options = parse_options(words, typed, problems)
        if options.local_output_dir != self.output:
            problems.append(
                "--trainer-options '--local-output-dir ...': the flow chooses this folder. Type --local-training-root "
                "to choose where it is made"
            )
        problems += option_problems(options)
        reachable = options if s3_works else replace(options, checkpoint_to=None)  # reported already
        if not remote:
            problems += destination_problems(reachable) + evaluation_problems(options)
        elif reachable.checkpoint_to:  # a pod has a disk of its own
            found = store_problems(reachable.checkpoint_to, None, "auto")
            problems += [f"--checkpoint-to {problem}" for problem in found]
        if problems:
            raise OptionsError(*problems)
        return options

    def _own_file(self, parameter: str, content: bytes) -> str:
        """Path of a user's file in the run's folder. Messages call the file as it was typed."""
        name = self.file_names.get(parameter)
        path = file_in_run(self.folder, parameter, content, name)
        self.names[path] = name or flag_of(parameter)
        return path

    def _worded(self, text: str) -> str:
        """A message of the trainer in the flow's words."""
        for path, name in self.names.items():
            text = text.replace(path, name)
        own_rows = self.training_file is not None and not self.training_dataset
        return worded(text.replace("--training-dataset", "--training-file") if own_rows else text, FLOW)

    def _machine_problems(self, machine: Machine, family: str, remote: bool) -> list[str]:
        """Conflicts of the parameters with the machine or with each other."""
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
                f"--gpu-family {family}: the pod was requested for {self.machine}. Leave it out and name the "
                "machine instead: --config-value machine 8xV100-32GB before run"
            )
        if self.ranks > machine.count:
            problems.append(
                f"--num-gpus {self.ranks}: {machine.name} has {machine.count}. Type a smaller number"
            )
        if self.training_file is not None and self.training_dataset:
            problems.append("--training-file and --training-dataset: give only one of them")
        return problems

    def _nodes_problems(self, machine: Machine, remote: bool) -> list[str]:
        """Why this flow cannot run on --num-nodes nodes."""
        if self.num_nodes == 1:
            return []
        return [f"--num-nodes {self.num_nodes}: expected 1, or python flows/{NODES_FLOW.name}"]

    def _plan(self, options: TrainingOptions, machine: Machine) -> Plan:
        """Tokenises the rows and plans the run. Stores the artifacts `ledger` and `plan`.

        Raises DataError, ModelError or OptionsError if the model or the rows cannot be used.
        """
        import datasets
        import transformers

        from training.data.held_out import held_out_message, held_out_size
        from training.plan.epoch import row_lengths
        from training.plan.report import as_json, as_table
        from training.run.prepare import tokenised_rows

        datasets.disable_progress_bars()  # a bar fills a task's log with lines
        transformers.utils.logging.disable_progress_bar()
        _, rows, ledger = tokenised_rows(options)
        test_size = held_out_size(options.test_size, len(rows))
        lengths = row_lengths(joined(options.training_dataset), rows["length"][:], ledger.response_tokens)
        settings = checked_settings(options, self.all_ranks, FAMILIES[machine.family].precision)
        model = model_of(options)
        plan = plan_run(settings, lengths, model, machine)
        plan = replace(plan, files=plan_files(settings, lengths, model, machine, settings.precision))
        ledger.source = self.names.get(ledger.source, ledger.source)
        self.ledger, self.plan = asdict(ledger), as_json(plan, price=None)
        held_out = held_out_message(test_size, len(rows), options.test_size)
        table = worded(as_table(plan, price=None, commands=False), FLOW)
        command = f"\n  {plan.command}" if plan.fits and self.num_nodes == 1 else ""  # of one node
        print(f"{ledger}\n{held_out}\n\n{table}{command}", flush=True)
        return plan

    def _write_files(self) -> None:
        """Writes the user's rows and prompts into the run's folder: each pod has its own disk."""
        for name, content in (("sample_prompts", self.prompts), ("training_dataset", self.training_file)):
            file = Path(sources_of(self.options[name])[0])
            # not a file named in --trainer-options
            if content is not None and file.is_relative_to(self.folder):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_file(file, content)

    def _keep_model(self) -> None:
        """Pushes the model to S3 if a root is configured. Stores the artifacts `model`, `record` and `versions`."""
        folder = Path(self.output)
        self.model = {"folder": self.output, "host": self.host, "files": model_digests(folder), "s3": None}
        try:
            self.model["s3"] = push(folder, self.model["files"], self)
        except StoreError as error:
            state = f"The model in {self.output} on {self.host} is complete"
            if pod.is_remote():
                state += ", but it is lost with the pod if that folder is on the pod's own disk"
            raise StepFailedError(StoreError(f"{error}. {state}")) from error
        self.record = finished_run(folder)
        # Metaflow in the flow's package has no metadata that importlib could read.
        own = {"metaflow": metaflow.__version__, "python": platform.python_version()}
        self.versions = self.record["versions"] | own


if __name__ == "__main__":
    if several_nodes(sys.argv):
        os.execv(sys.executable, [sys.executable, str(NODES_FLOW), *sys.argv[1:]])
    TrainDollyFlow()
