"""@gpu_profile: what a step does with its GPUs and how far its training is, as a card that grows while it runs.

Lay this file beside any flow; it needs Metaflow, and nvidia-ml-py and psutil where the step runs:

    from gpu_profile import gpu_profile

    @gpu_profile(interval=1.0, run_folder="output")    # self.output names a run's folder; without it: devices alone
    @step
    def train(self): ...

A fault of the profile is told in the card and never reaches the step. `python gpu_profile.py flow.py` shows the cards
of a flow live, to this machine alone.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import runpy
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    from metaflow import StepMutator, current, user_step_decorator
    from metaflow.cards import Markdown, ProgressBar, PythonCode, Table, VegaChart
    from metaflow.exception import MetaflowException
except ImportError as error:
    raise ImportError(
        f"@gpu_profile needs Metaflow 2.19.39 or newer. Type python -m pip install '.[metaflow]' ({error})"
    ) from error

CARD = "gpu_profile"
GIB = 2**30
# Points of a curve at most. With eight GPUs a card's data is then some 150 kB however long the step.
POINTS = 200
REFRESH_SECONDS = 10.0  # each refresh starts a Python process
STAGES_SHOWN = 6
STAGES_KEPT = 24
PROMPTS = 10
ANSWER_CHARACTERS = 600
ERROR_LINES = 40
# nvidia-smi's words for what two GPUs have in common, by nvmlGpuTopologyLevel_t.
ANCESTORS = {0: "PSB", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
LEGEND = (
    "NV#: # NVLinks; PSB: one board; PIX: one PCIe switch; PXB: several PCIe switches; PHB: a PCIe host bridge; "
    "NODE: host bridges of one NUMA node; SYS: the link between NUMA nodes; ?: the driver does not tell"
)


class Series:
    """Figures over x (seconds or steps), in at most `points` buckets of one width, of each the mean and the maximum.

    When there are too many, each two become one, twice as wide: a peak is never lost, and ten hours take the room
    of ten minutes.
    """

    def __init__(self, width: float, points: int = POINTS):
        self.width, self.points = width, points
        self.buckets: dict[int, dict[str, tuple[int, float, float]]] = {}  # name -> count, sum, maximum

    def add(self, x: float, figures: Mapping[str, Any]) -> None:
        """Adds what is a finite number."""
        numbers = {name: number(value) for name, value in figures.items()}
        taken = {name: (1, value, value) for name, value in numbers.items() if value is not None}
        if not taken:
            return
        self._merge(int(x // self.width), {"x": (1, x, x), **taken})
        while len(self.buckets) > self.points:
            halved, self.buckets, self.width = self.buckets, {}, 2 * self.width
            for place, bucket in halved.items():
                self._merge(place // 2, bucket)

    def _merge(self, place: int, bucket: Mapping[str, tuple[int, float, float]]) -> None:
        into = self.buckets.setdefault(place, {})
        for name, (count, total, most) in bucket.items():
            before = into.get(name, (0, 0.0, -math.inf))
            into[name] = (before[0] + count, before[1] + total, max(before[2], most))

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for bucket in self.buckets.values() for name in bucket if name != "x"))

    def rows(self, scale: float = 1.0) -> list[dict[str, float]]:
        """One object a bucket: mean x divided by `scale`, each figure's mean by its name, "max NAME" where it is more."""
        rows = []
        for _, bucket in sorted(self.buckets.items()):
            row = {"x": round(bucket["x"][1] / bucket["x"][0] / scale, 3)}
            for name, (count, total, most) in bucket.items():
                if name != "x":
                    row[name] = _short(total / count)
                    if count > 1 and _short(most) > row[name]:
                        row[f"max {name}"] = _short(most)
            rows.append(row)
        return rows

    def mean(self, name: str) -> float | None:
        found = [bucket[name] for bucket in self.buckets.values() if name in bucket]
        return sum(total for _, total, _ in found) / sum(count for count, _, _ in found) if found else None

    def peak(self, name: str) -> float | None:
        return max((bucket[name][2] for bucket in self.buckets.values() if name in bucket), default=None)


class Gpus:
    """The NVIDIA GPUs of this machine, by NVML. Raises ImportError or NVMLError where there are none.

    What a driver does not tell (MIG, virtual GPUs, old boards) is None, and costs none of the rest.
    """

    def __init__(self) -> None:
        import pynvml  # the module of nvidia-ml-py

        self.nvml = pynvml
        pynvml.nvmlInit()
        found = {
            n: self.ask(pynvml.nvmlDeviceGetHandleByIndex, n) for n in range(pynvml.nvmlDeviceGetCount())
        }
        boards = {f"GPU {n}": board for n, board in found.items() if board is not None}
        if not boards:
            raise RuntimeError("NVML finds no GPU")
        self.driver = _text(self.ask(pynvml.nvmlSystemGetDriverVersion))
        version = self.ask(pynvml.nvmlSystemGetCudaDriverVersion)  # 12040 is CUDA 12.4
        self.cuda = None if version is None else f"{version // 1000}.{version % 1000 // 10}"
        self.handles = dict(boards)
        self.topology = self._topology(boards)
        for name, board in boards.items():
            self.handles |= {f"{name} MIG {slot}": part for slot, part in self._instances(board)}
        self.devices: list[dict[str, Any]] = [
            {
                "device": name,
                "type": _text(self.ask(pynvml.nvmlDeviceGetName, handle)),
                "memory_gib": _gib(self.ask(pynvml.nvmlDeviceGetMemoryInfo, handle), "total"),
                "bus": self._bus(handle),
            }
            for name, handle in self.handles.items()
        ]

    def ask(self, query: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of a query, None if the driver has none."""
        try:
            return query(*arguments)
        except self.nvml.NVMLError:
            return None

    def read(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Utilisation in percent and used memory in GiB, by device. Raises NVMLError if no device tells anything."""
        use, memory = {}, {}
        for name, handle in self.handles.items():
            rates = self.ask(self.nvml.nvmlDeviceGetUtilizationRates, handle)
            use[name] = None if rates is None else float(rates.gpu)
            memory[name] = _gib(self.ask(self.nvml.nvmlDeviceGetMemoryInfo, handle), "used")
        if not any(value is not None for value in (*use.values(), *memory.values())):
            self.nvml.nvmlDeviceGetMemoryInfo(next(iter(self.handles.values())))  # says why
        return use, memory

    def close(self) -> None:
        self.nvml.nvmlShutdown()

    def _instances(self, board: Any) -> Iterator[tuple[int, Any]]:
        """The parts of a board that MIG has divided, with their slots."""
        mode = self.ask(self.nvml.nvmlDeviceGetMigMode, board)
        if mode and mode[0] == self.nvml.NVML_DEVICE_MIG_ENABLE:
            for slot in range(self.ask(self.nvml.nvmlDeviceGetMaxMigDeviceCount, board) or 0):
                part = self.ask(self.nvml.nvmlDeviceGetMigDeviceHandleByIndex, board, slot)
                if part is not None:
                    yield slot, part

    def _topology(self, boards: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Between each two GPUs the word that `nvidia-smi topo -m` prints."""
        links = {name: self._links(board) for name, board in boards.items()}
        buses = {name: self._bus(board) for name, board in boards.items()}

        def word(one: str, other: str) -> str:
            if one == other:
                return "X"
            straight = links[one].count(buses[other]) if buses[other] else 0
            # All links of a GPU on an NVSwitch lead to the switch, and by it to every other GPU.
            count = straight or min(links[one].count("switch"), links[other].count("switch"))
            if count:
                return f"NV{count}"
            level = self.ask(self.nvml.nvmlDeviceGetTopologyCommonAncestor, boards[one], boards[other])
            return ANCESTORS.get(level, "?")

        return {one: {other: word(one, other) for other in boards} for one in boards}

    def _links(self, board: Any) -> list[str | None]:
        """Where the board's active NVLinks end: the other GPU's bus, or "switch"."""
        ends = []
        for link in range(self.nvml.NVML_NVLINK_MAX_LINKS):
            if self.ask(self.nvml.nvmlDeviceGetNvLinkState, board, link):
                kind = self.ask(self.nvml.nvmlDeviceGetNvLinkRemoteDeviceType, board, link)
                remote = self.ask(self.nvml.nvmlDeviceGetNvLinkRemotePciInfo, board, link)
                at_switch = kind == self.nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
                ends.append("switch" if at_switch else _text(getattr(remote, "busId", None)))
        return ends

    def _bus(self, handle: Any) -> str | None:
        return _text(getattr(self.ask(self.nvml.nvmlDeviceGetPciInfo, handle), "busId", None))


class Host:
    """This machine's processors, memory and one disk, by psutil; in a container its own limit of memory."""

    def __init__(self) -> None:
        import psutil

        self.psutil = psutil
        self.cores = psutil.cpu_count()
        psutil.cpu_percent()  # the first answer of a thread is 0

    def read(self, folder: Path) -> dict[str, float]:
        """Percent of processors, memory and the disk of `folder`; the last two in GiB as well, used and of how many."""
        used, total = container_memory() or self._memory()
        disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
        return {
            "CPU": self.psutil.cpu_percent(),
            "memory": 100 * used / total,
            "disk": 100 * disk.used / disk.total,
            "memory GiB": used / GIB,
            "memory total GiB": total / GIB,
            "disk GiB": disk.used / GIB,
            "disk total GiB": disk.total / GIB,
        }

    def _memory(self) -> tuple[int, int]:
        memory = self.psutil.virtual_memory()
        return memory.total - memory.available, memory.total


def container_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Bytes that this container uses, and may use, cached files left out; None where nothing limits it."""
    for limit_file, used_file, cache in (  # cgroups version 2, then 1
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((cgroups / limit_file).read_text())
            used = int((cgroups / used_file).read_text())
            lines = ((cgroups / limit_file).parent / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        cached = dict(line.split() for line in lines).get(cache, 0)
        if limit < 2**60:  # version 1 says "no limit" with a number near 2**63
            return max(0, used - int(cached)), limit
    return None


class Lines:
    """The lines of a growing file of JSON objects, each read once, whatever the file's size."""

    def __init__(self, file: Path):
        self.file, self.place, self.inode = file, 0, 0

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file began anew, the objects since last time). A last line without its end waits for it."""
        if not self.file.exists():
            return False, []
        with open(self.file, "rb") as stream:
            status = os.fstat(stream.fileno())
            # A run that is resumed writes a shorter file and puts it in the place of the former.
            anew = status.st_ino != self.inode or status.st_size < self.place
            self.inode, self.place = status.st_ino, 0 if anew else self.place
            stream.seek(self.place)
            whole = stream.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self.place += len(whole)
        entries = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and number(entry.get("step")) is not None:
                    entries.append(entry)
        return anew, entries


class Run:
    """What a run has told so far in its folder: metrics.jsonl and samples.jsonl, one JSON object a line.

    {"step": 10, "max_steps": 797, "epoch": 0.01, "seconds": 12.3, "loss": 1.9, "tokens_per_second": 9000.0, ...}
    {"step": 100, "max_steps": 797, "epoch": 0.13, "seconds": 80.1, "eval_loss": 1.5}
    {"step": 100, "epoch": 0.13, "instruction": "Name a river.", "input": "", "response": "The Rhine"}
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics, self.samples = Lines(folder / "metrics.jsonl"), Lines(folder / "samples.jsonl")
        self._forget_metrics()
        self._forget_samples()

    def _forget_metrics(self) -> None:
        self.loss, self.speed = Series(1), Series(1)
        self.last: dict[str, Any] = {}
        self.pace: deque[tuple[float, float]] = deque(maxlen=20)  # (step, seconds) of the latest lines

    def _forget_samples(self) -> None:
        self.answers: dict[float, dict[str, str]] = {}  # step -> prompt -> answer
        self.epochs: dict[float, Any] = {}

    def read(self) -> None:
        """Takes in what is new. Raises OSError if a file is there and cannot be read."""
        anew, entries = self.metrics.new()
        if anew:
            self._forget_metrics()
        for entry in entries:
            step = float(entry["step"])
            self.loss.add(step, {"loss": entry.get("loss"), "held-out loss": entry.get("eval_loss")})
            self.speed.add(step, {"tokens/s": entry.get("tokens_per_second")})
            self.last |= {name: value for name, value in entry.items() if number(value) is not None}
            seconds = number(entry.get("seconds"))
            if seconds is not None and (not self.pace or step > self.pace[-1][0]):
                self.pace.append((step, seconds))
        anew, entries = self.samples.new()
        if anew:
            self._forget_samples()
        for entry in entries:
            self._take_answer(entry)

    def _take_answer(self, entry: Mapping[str, Any]) -> None:
        step = float(entry["step"])
        words = [str(entry.get(name) or "") for name in ("instruction", "input")]
        prompt = _cut("\n".join(word for word in words if word))
        if step not in self.answers and len(self.answers) >= STAGES_KEPT:
            for dropped in list(self.answers)[
                1::2
            ]:  # the first one stays, for it is what training began with
                del self.answers[dropped], self.epochs[dropped]
        stage = self.answers.setdefault(step, {})
        self.epochs[step] = number(entry.get("epoch"))
        if prompt in stage or len(stage) < PROMPTS:
            stage[prompt] = _cut(str(entry.get("response", "")))

    def progress(self) -> tuple[int, str, str]:
        """(percent, latest figures, time that is left at the latest pace), in words."""
        step, steps = number(self.last.get("step")) or 0, number(self.last.get("max_steps")) or 0
        words = [f"step {step:,.0f} of {steps:,.0f}" if steps else f"step {step:,.0f}"]
        for name, form in (
            ("epoch", "epoch {:.2f}"),
            ("loss", "loss {:.3g}"),
            ("eval_loss", "held-out loss {:.3g}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
        ):
            if name in self.last:
                words.append(form.format(self.last[name]))
        left = "at its end" if steps and step >= steps else "time left not known yet"
        if self.pace and steps > step:
            begin = self.pace[0] if len(self.pace) > 1 else (0.0, 0.0)
            now = self.pace[-1]
            if now[0] > begin[0]:
                left = f"{duration((steps - step) * (now[1] - begin[1]) / (now[0] - begin[0]))} left"
        return (int(min(100, 100 * step / steps)) if steps else 0), ", ".join(words), left

    def stages(self) -> list[float]:
        """The steps whose answers are shown: the first, the last, and evenly between."""
        steps = sorted(self.answers)
        if len(steps) <= STAGES_SHOWN:
            return steps
        return [steps[round(n * (len(steps) - 1) / (STAGES_SHOWN - 1))] for n in range(STAGES_SHOWN)]

    def answer_table(self) -> tuple[list[str], list[Any]]:
        """(headers, rows): a row an instruction, a column a stage."""
        stages = self.stages()
        # A header is not broken into lines: the shorter word for a stage, where it tells all of them apart.
        epochs = [f"epoch {epoch:.2f}" for epoch in map(self.epochs.get, stages) if epoch is not None]
        names = epochs if len(set(epochs)) == len(stages) else [f"step {step:,.0f}" for step in stages]
        prompts = list(dict.fromkeys(prompt for step in stages for prompt in self.answers[step]))[:PROMPTS]
        return ["instruction", *names], [
            [p, *(self.answers[step].get(p, "") for step in stages)] for p in prompts
        ]


class Profiler:
    """Samples in one thread and draws in another, so that a slow card leaves no gap in the curves.

    Args:
        card: `current.card[ID]`.
        title: Markdown of the first line.
        interval: seconds between two samples.
        folder: gives the folder of the run, None as long as there is none.
    """

    def __init__(self, card: Any, title: str, interval: float, folder: Callable[[], Path | None]):
        self.card, self.title, self.interval, self.folder = card, title, interval, folder
        self.began = time.monotonic()
        self.lock = threading.Lock()
        self.halt = threading.Event()
        self.faults: dict[str, str] = {}
        self.ended: float | None = None
        self.error: BaseException | str | None = None
        self.gpus: Gpus | None = None
        self.host: Host | None = None
        self.run: Run | None = None
        self.totals: dict[str, float] = {}
        self.use, self.memory, self.machine = Series(interval), Series(interval), Series(interval)
        self.count = 0
        self.parts: dict[str, Any] = {}  # the card's components, by what they show
        self.shown: list[Any] = []
        self.sampler = threading.Thread(target=self._sample, daemon=True, name="gpu_profile samples")
        self.painter = threading.Thread(target=self._paint, daemon=True, name="gpu_profile card")

    def start(self) -> None:
        self.sampler.start()
        self.painter.start()

    def stop(self, error: BaseException | str | None) -> dict[str, Any]:
        """Ends both threads, draws what there is, and returns it as plain objects. `error`: why the step failed."""
        if self.ended is None:
            self.ended, self.error = time.monotonic(), error
            self.halt.set()
            self.sampler.join(timeout=10)  # a driver that hangs holds no step up
            self.painter.join(timeout=60)
            if self.painter.is_alive():
                self.faults["card"] = "the last refresh did not end within 60 s"
            else:
                with self.harmless("card"):
                    self.draw()
                    # Of itself Metaflow draws the card once more only for a step that succeeds.
                    for _ in range(
                        0 if error is None else 2
                    ):  # the second waits for what the first finds under way
                        self.card.refresh(force=True)
            if self.gpus and not self.sampler.is_alive():
                with self.harmless("GPUs"):
                    self.gpus.close()
        with self.lock:
            return self._record()

    @contextlib.contextmanager
    def harmless(self, part: str) -> Iterator[None]:
        """Keeps a fault of the profile from the step; the card tells the latest of each part."""
        try:
            yield
        except Exception as fault:
            self.faults[part] = _cut(f"{type(fault).__name__}: {fault}")

    def _sample(self) -> None:
        with self.harmless("GPUs"):
            self.gpus = Gpus()
        with self.harmless("host"):
            self.host = Host()
        due = time.monotonic()
        while not self.halt.wait(max(0.0, due - time.monotonic())):
            due = max(due + self.interval, time.monotonic())  # what was missed is not made up for
            self.sample(self.seconds())

    def seconds(self) -> float:
        """Since the step began, until it ended."""
        return (self.ended or time.monotonic()) - self.began

    def sample(self, seconds: float) -> None:
        """Reads everything once."""
        use: dict[str, float | None] = {}
        memory: dict[str, float | None] = {}
        machine: dict[str, float] = {}
        if self.gpus:
            with self.harmless("GPUs"):
                use, memory = self.gpus.read()
        if self.host:
            with self.harmless("host"):
                machine = self.host.read(self.where())
        with self.lock:
            self.use.add(seconds, use)
            self.memory.add(seconds, memory)
            self.machine.add(seconds, {n: v for n, v in machine.items() if "total" not in n})
            self.totals |= {n: v for n, v in machine.items() if "total" in n}
            self.count += 1

    def where(self) -> Path:
        """The folder whose disk is watched: the run's if there is one."""
        with self.harmless("run folder"):
            return self.folder() or Path.cwd()
        return Path.cwd()

    def _paint(self) -> None:
        drawn = 0.0
        wait = 1.0
        while not self.halt.wait(wait):
            since = self.seconds()
            wait = min(
                REFRESH_SECONDS, max(3.0, since / 4)
            )  # sooner at first: somebody waits to see something
            with self.harmless("card"):
                changed = self.draw()
                if _card_process_runs(self.card):
                    continue  # a machine this busy shall not be given more to do
                # A plain refresh gives its figures to who looks on in a browser. What `card view` and `card get` show
                # is drawn whole, which takes two processes: seldom.
                whole = changed or since - drawn > min(300.0, max(30.0, since / 10))
                drawn = since if whole else drawn
                self.card.refresh(force=whole)

    def draw(self) -> bool:
        """Brings the card's components up to date. Returns whether there are others than before."""
        with self.harmless("run"):
            folder = self.folder()
            if folder is not None and (self.run is None or self.run.folder != folder):
                self.run = Run(folder)
            if self.run is not None:  # after sys.exit the flow has no attributes any more
                self.run.read()
        layout: list[Any] = []
        for section in (self._status, self._training, self._devices):
            with self.lock, self.harmless("card"):
                layout += section()
        if [id(part) for part in layout] == [id(part) for part in self.shown]:
            return False
        self.card.clear()
        self.card.extend(layout)
        self.shown = layout
        return True

    def _status(self) -> Iterator[Any]:
        yield self.part("title", lambda: Markdown(self.title))
        state = "runs" if self.ended is None else "has ended" if self.error is None else "has failed"
        yield self.markdown("state", f"The step {state}: {duration(self.seconds())}, {self.count:,} samples")
        if self.error is not None:
            yield self.part("error head", lambda: Markdown("## The step failed"))
            yield self.part("error", lambda: PythonCode(code_string=error_text(self.error)))
        faults = {part: text for part, text in dict(self.faults).items() if part != "GPUs" or self.gpus}
        if faults:
            yield self.part(
                "fault head", lambda: Markdown("**What the profile could not do** (the step goes on)")
            )
            rows: list[Any] = [[part, text] for part, text in faults.items()]
            yield self.part(f"faults {rows}", lambda: Table(rows, headers=["part", "fault"]), of="faults")

    def _training(self) -> Iterator[Any]:
        if self.run is None:
            return
        yield self.part("run head", lambda: Markdown("## Training"))
        if not self.run.last:
            yield self.markdown("run state", "Nothing told yet: metrics.jsonl is not there, or is empty.")
        else:
            percent, words, left = self.run.progress()
            yield self.markdown("run state", words)
            bar = self.part("bar", lambda: ProgressBar(max=100, label="training", unit="%"))
            bar.update(percent, left)
            yield bar
            yield from self.chart("loss", self.run.loss, "step", "loss")
            yield from self.chart("speed", self.run.speed, "step", "tokens/s", zero=True)
        headers, rows = self.run.answer_table()
        if rows:
            hidden = len(self.run.answers) - len(self.run.stages())
            note = f", of {len(self.run.answers)} stages {len(self.run.stages())}" if hidden else ""
            yield self.part(f"answers head{note}", lambda: Markdown(f"## Answers{note}"), of="answers head")
            # Cells that are strings are shown as they are; Markdown would take a model's answer for HTML.
            yield self.part(f"answers {headers} {rows}", lambda: Table(rows, headers=headers), of="answers")

    def _devices(self) -> Iterator[Any]:
        yield self.part("device head", lambda: Markdown("## Devices"))
        if self.gpus:
            gpus = self.gpus
            words = f"Driver {gpus.driver or '?'}, CUDA {gpus.cuda or '?'} (the newest that this driver runs)"
            yield self.part("driver", lambda: Markdown(words))
        elif "GPUs" in self.faults:
            what, why = "No NVIDIA GPU", self.faults["GPUs"]
            if "host" in self.faults and not self.host:
                what, why = "**No device can be read**", f"{why}; {self.faults['host']}"
            why = " ".join(why.replace("`", "'").split())
            yield self.part(f"no gpu {why}", lambda: Markdown(f"{what}: `{why}`"), of="no gpu")
        yield from self._device_table()
        unit, scale = time_unit(self.seconds())
        yield from self.chart("GPU utilisation", self.use, unit, "%", scale=scale, top=100.0)
        sizes = [device["memory_gib"] or 0 for device in self.gpus.devices] if self.gpus else [0]
        yield from self.chart(
            "GPU memory", self.memory, unit, "GiB", scale=scale, top=max(sizes) or None, zero=True
        )
        names = ["CPU", "memory", "disk"]
        yield from self.chart("host", self.machine, unit, "%", names=names, scale=scale, top=100.0)
        if self.gpus and len(self.gpus.topology) > 1:
            heads = list(self.gpus.topology)
            matrix: list[Any] = [[name, *words.values()] for name, words in self.gpus.topology.items()]
            yield self.part("links head", lambda: Markdown("## How the GPUs are connected"))
            yield self.part("links", lambda: Table(matrix, headers=["", *heads]))
            yield self.part("links legend", lambda: Markdown(LEGEND))

    def _device_table(self) -> Iterator[Any]:
        """Each device with its mean and highest figures. Of a table, Metaflow brings Markdown cells up to date alone."""
        rows: list[list[str]] = []
        for device in self.gpus.devices if self.gpus else ():
            name, size = device["device"], device["memory_gib"]
            used = f"{_figure(self.memory.peak(name), '.1f')} of {_figure(size, '.1f')} GiB"
            kind = f"{device['type'] or '?'}, {device['bus'] or '?'}"
            rows.append([name, kind, *_use(self.use, name), used])
        if self.host:
            rows.append(["CPU", f"{self.host.cores} cores", *_use(self.machine, "CPU"), ""])
            for name in ("memory", "disk"):
                most, total = self.machine.peak(f"{name} GiB"), self.totals.get(f"{name} total GiB")
                used = f"{_figure(most, '.1f')} of {_figure(total, '.1f')} GiB"
                rows.append([name, "host" if name == "memory" else "", *_use(self.machine, name), used])
        if rows:
            cells = [
                [*row[:2], *(self.markdown(f"cell {y} {x}", text) for x, text in enumerate(row[2:]))]
                for y, row in enumerate(rows)
            ]
            headers = ["device", "type", "mean use", "peak use", "peak memory"]
            yield self.part(f"devices {len(rows)}", lambda: Table(cells, headers=headers), of="devices")

    def chart(
        self, title: str, series: Series, x: str, y: str, names: Iterable[str] = (), **how: Any
    ) -> Iterator[Any]:
        names = [name for name in names or series.names() if name in series.names()]
        if names:
            spec = chart_spec(title, series.rows(how.pop("scale", 1.0)), names, x, y, **how)
            part = self.part(f"chart {title}", lambda: VegaChart(spec))
            part.update(spec)
            yield part

    def part(self, name: str, make: Callable[[], Any], of: str | None = None) -> Any:
        """The component of that name, made once. With `of`, a former one of the same place is dropped."""
        place, known = of or name, self.parts.get(of or name)
        if known is None or known[0] != name:
            known = self.parts[place] = (name, make())
        return known[1]

    def markdown(self, name: str, text: str) -> Any:
        part = self.part(name, lambda: Markdown(text))
        part.update(text)
        return part

    def _record(self) -> dict[str, Any]:
        """The profile as an artifact."""
        return {
            "seconds": self.seconds(),
            "interval": self.interval,
            "samples": self.count,
            "driver": self.gpus.driver if self.gpus else None,
            "cuda": self.gpus.cuda if self.gpus else None,
            "devices": self.gpus.devices if self.gpus else [],
            "topology": self.gpus.topology if self.gpus else {},
            "gpu_utilisation_percent": self.use.rows(),
            "gpu_memory_gib": self.memory.rows(),
            "host": self.machine.rows(),
            "peaks": {
                "gpu_utilisation_percent": {name: self.use.peak(name) for name in self.use.names()},
                "gpu_memory_gib": {name: self.memory.peak(name) for name in self.memory.names()},
                "host": {name: self.machine.peak(name) for name in self.machine.names()},
            },
            "faults": dict(self.faults),
        }


def chart_spec(
    title: str,
    rows: list[dict[str, float]],
    names: list[str],
    x: str,
    y: str,
    top: float | None = None,
    zero: bool = False,
) -> dict[str, Any]:
    """A Vega-Lite chart of a line each name, over the mean; what the maximum of a bucket is above it lies in a pale line."""
    scale: dict[str, Any] = {"zero": zero} if top is None else {"domain": [0, top]}
    few = len(rows) <= 40
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": x, "scale": {"zero": False, "nice": False}},
        "y": {"field": "value", "type": "quantitative", "title": y, "scale": scale},
        "color": {
            "field": "name",
            "type": "nominal",
            "title": None,
            "sort": names,
            "legend": {"symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 3},
        },
        "tooltip": [{"field": "name"}, {"field": "x", "title": x}, {"field": "value", "title": y}],
    }

    def layer(fields: list[str], name: str, mark: dict[str, Any]) -> dict[str, Any]:
        return {
            "transform": [
                {"fold": fields, "as": ["field", "value"]},
                {"filter": "isValid(datum.value)"},
                {"calculate": name, "as": "name"},
            ],
            "mark": {"type": "line", "interpolate": "linear", **mark},
            "encoding": encoding,
        }

    keep = {"x", *names, *(f"max {name}" for name in names)}
    values = [{name: value for name, value in row.items() if name in keep} for row in rows]
    layers = [layer(names, "datum.field", {"strokeWidth": 2, "point": few})]
    maxima = [f"max {name}" for name in names if any(f"max {name}" in row for row in values)]
    if maxima:
        layers.insert(0, layer(maxima, "slice(datum.field, 4)", {"strokeWidth": 1, "opacity": 0.35}))
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": title,
        "height": 220,
        "data": {"values": values},
        "layer": layers,
    }


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def duration(seconds: float) -> str:
    """Seconds in words: "12 s", "5 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def time_unit(seconds: float) -> tuple[str, float]:
    """(title, seconds) of the unit in which a step this long is drawn."""
    name, scale = (
        ("seconds", 1.0) if seconds < 300 else ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
    )
    return f"{name} since the step began", scale


def error_text(error: BaseException | str | None) -> str:
    """The error and where it came from; of a long one the last lines, which say what it was."""
    if isinstance(error, BaseException):
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    else:
        lines = str(error).splitlines()
    return "\n".join(["..."] * (len(lines) > ERROR_LINES) + [line[:500] for line in lines[-ERROR_LINES:]])


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _figure(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _use(series: Series, name: str) -> list[str]:
    mean, peak = series.mean(name), series.peak(name)
    return [f"{mean:.0f} %" if mean is not None else "?", f"{peak:.0f} %" if peak is not None else "?"]


def _gib(memory: Any, part: str) -> float | None:
    return None if memory is None else getattr(memory, part) / GIB


def _text(value: bytes | str | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER_CHARACTERS else text[: ANSWER_CHARACTERS - 1] + "…"


def _card_process_runs(card: Any) -> bool:
    """Whether the process of the last refresh is still at work. Metaflow then drops the next one, and its files."""
    with contextlib.suppress(Exception):  # Metaflow's own affairs, which another version may order otherwise
        from metaflow.plugins.cards.card_creator import CardProcessManager

        process, _ = CardProcessManager._get_card_process(card._card_creator_args["card_uuid"])
        return process is not None and process.poll() is None
    return False


@user_step_decorator
def _profiled(step_name: str, flow: Any, inputs: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    profiler = _begin(flow, attributes)
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
        raise
    finally:
        if profiler is not None:
            _end(profiler, flow, step_name, failure)


def _begin(flow: Any, attributes: Mapping[str, Any]) -> Profiler | None:
    """A profiler at work, None if there can be none."""
    name = attributes.get("run_folder")

    def folder() -> Path | None:
        place = getattr(flow, name, None) if name else None
        return Path(place) if place else None

    try:
        here: Any = current  # what it has depends on the step's decorators
        title = f"# `{here.pathspec}`"
        profiler = Profiler(here.card[CARD], title, float(attributes["interval"]), folder)
        profiler.start()
        # A step that leaves by sys.exit passes every decorator by.
        atexit.register(profiler.stop, "The step left before its end, by sys.exit or an interruption.")
    except Exception as fault:
        print(f"@gpu_profile: this step goes without its profile: {fault!r}", file=sys.stderr)
        return None
    return profiler


def _end(profiler: Profiler, flow: Any, step_name: str, error: BaseException | None) -> None:
    try:
        record = profiler.stop(error)
        atexit.unregister(profiler.stop)
        # A name of its own for every task, or a join of profiled steps could not merge their artifacts.
        places = [str(frame[0]) for frame in flow.foreach_stack() or ()]
        setattr(flow, "_".join(["gpu_profile", step_name, *places]), record)
    except Exception as fault:
        print(f"@gpu_profile: the profile of this step is lost: {fault!r}", file=sys.stderr)


class gpu_profile(StepMutator):  # noqa: N801 - named as decorators are
    """Adds the card and what fills it to a step.

    Args:
        interval: seconds between two samples, 0.1 or more.
        run_folder: name of the flow's attribute that holds the folder of a run, whose curves and answers are drawn.

    The profile is an artifact as well: gpu_profile_STEP, and gpu_profile_STEP_N in the N-th task of a foreach.
    """

    def init(self, interval: float = 1.0, run_folder: str | None = None) -> None:
        if number(interval) is None or interval < 0.1:
            raise MetaflowException(f"@gpu_profile: interval is {interval!r}; give seconds, 0.1 or more")
        if run_folder is not None and not str(run_folder).isidentifier():
            raise MetaflowException(
                f"@gpu_profile: run_folder is {str(run_folder)!r}; give the name of the attribute that holds the "
                'folder: run_folder="output" for self.output'
            )
        self.attributes = {"interval": float(interval)} | ({"run_folder": run_folder} if run_folder else {})

    def mutate(self, mutable_step: Any) -> None:
        # refresh_interval=0: the profiler keeps its own time, and Metaflow's would drop a failed step's last word.
        mutable_step.add_decorator("card", deco_kwargs={"type": "blank", "id": CARD, "refresh_interval": 0})
        mutable_step.add_decorator(_profiled, deco_kwargs=self.attributes)


def main() -> None:
    """Shows the cards of a flow live at http://127.0.0.1:8324: Metaflow's own card server, which listens on every network
    of the machine, bound to this machine alone. Arguments: the flow's file, and options of `card server`."""
    from metaflow.plugins.cards import card_server

    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("Type python gpu_profile.py FLOW.py [--run-id ID] [--port PORT]")

    server: Any = card_server

    class ThisMachineAlone(server.ThreadingHTTPServer):
        def __init__(self, address: tuple[str, int], routes: Any):
            super().__init__(("127.0.0.1", address[1]), routes)

    server.ThreadingHTTPServer = ThisMachineAlone
    flow = str(Path(sys.argv[1]).resolve())
    sys.argv = [flow, "card", "server", *sys.argv[2:]]
    sys.path.insert(0, str(Path(flow).parent))
    runpy.run_path(flow, run_name="__main__")


if __name__ == "__main__":
    main()
