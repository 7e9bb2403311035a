"""@gpu_profile: a live Metaflow card of a step with its GPUs, its host and the progress of its training.

Put this file beside any flow. It needs Metaflow, and nvidia-ml-py and psutil where the step runs:

    from gpu_profile import gpu_profile

    @gpu_profile(interval=1.0, run_folder="output")    # self.output: a run's folder. Default: devices only
    @step
    def train(self): ...

An error of the profile is shown in the card and never reaches the step. `python gpu_profile.py flow.py` serves the
cards of a flow live, on this machine only.

It is one file so that it can be copied. Its parts: figures over time, devices, the run's files, charts and text, the
profiler, the decorator, live cards.
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
from collections.abc import Callable, Iterator, Mapping
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
# Most points of a curve. With eight GPUs the data of a card stays below 150 kB, however long the step is.
POINTS = 200
REFRESH_SECONDS = 10.0  # each refresh starts a Python process
STAGES_SHOWN = 6
PROMPTS = 10
ANSWER_CHARACTERS = 600
ERROR_LINES = 40
# nvidia-smi's names for the connection of two GPUs, by nvmlGpuTopologyLevel_t.
ANCESTORS = {0: "PSB", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
LEGEND = (
    "NV#: # NVLinks; PSB: one board; PIX: one PCIe switch; PXB: several PCIe switches; PHB: a PCIe host bridge; "
    "NODE: host bridges of one NUMA node; SYS: the link between NUMA nodes; ?: not reported by the driver"
)

Rows = list[dict[str, float]]  # {"x": 12.5, "GPU 0": 87.0, "max GPU 0": 100.0}

# --- figures over time --------------------------------------------------------------------------------


class Series:
    """Figures over x (seconds or steps), in at most `points` buckets of equal width.

    A bucket keeps the count, sum and maximum of each figure. If there are too many buckets, pairs of them are merged
    into buckets of twice the width. So no peak is lost, and ten hours need no more memory than ten minutes.
    """

    def __init__(self, width: float, points: int = POINTS):
        self.width, self.points = width, points
        self.buckets: dict[int, dict[str, tuple[int, float, float]]] = {}  # name -> count, sum, maximum

    def add(self, x: float, figures: Mapping[str, Any]) -> None:
        """Adds the figures that are finite numbers."""
        added = {name: (1, n, n) for name, value in figures.items() if (n := number(value)) is not None}
        if not added:
            return
        self._merge(int(x // self.width), {"x": (1, x, x), **added})
        while len(self.buckets) > self.points:
            narrow, self.buckets, self.width = self.buckets, {}, 2 * self.width
            for index, bucket in narrow.items():
                self._merge(index // 2, bucket)

    def _merge(self, index: int, bucket: Mapping[str, tuple[int, float, float]]) -> None:
        into = self.buckets.setdefault(index, {})
        for name, (count, total, most) in bucket.items():
            before = into.get(name, (0, 0.0, -math.inf))
            into[name] = (before[0] + count, before[1] + total, max(before[2], most))

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for bucket in self.buckets.values() for name in bucket if name != "x"))

    def rows(self, scale: float = 1.0) -> Rows:
        """One object a bucket: mean x / `scale`, the mean of each figure, and "max NAME" if the maximum is larger."""
        rows = []
        for _, bucket in sorted(self.buckets.items()):
            means = {name: total / count for name, (count, total, _) in bucket.items()}
            row = {"x": round(means.pop("x") / scale, 3)}
            for name, mean in means.items():
                row[name], most = _short(mean), _short(bucket[name][2])
                if most > row[name]:
                    row[f"max {name}"] = most
            rows.append(row)
        return rows

    def mean(self, name: str) -> float | None:
        found = [bucket[name] for bucket in self.buckets.values() if name in bucket]
        return sum(total for _, total, _ in found) / sum(count for count, _, _ in found) if found else None

    def peak(self, name: str) -> float | None:
        return max((bucket[name][2] for bucket in self.buckets.values() if name in bucket), default=None)

    def peaks(self) -> dict[str, float | None]:
        return {name: self.peak(name) for name in self.names()}


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if finite else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# --- devices ------------------------------------------------------------------------------------------


class Gpus:
    """The NVIDIA GPUs of this machine, read by NVML. Raises ImportError, NVMLError or RuntimeError if there are none.

    A value that the driver does not report (MIG, virtual GPUs, old boards) is None.
    """

    def __init__(self) -> None:
        import pynvml  # the module of nvidia-ml-py

        self.nvml = pynvml
        pynvml.nvmlInit()
        numbers = range(pynvml.nvmlDeviceGetCount())
        boards = _known({f"GPU {n}": self.ask(pynvml.nvmlDeviceGetHandleByIndex, n) for n in numbers})
        if not boards:
            raise RuntimeError("NVML finds no GPU")
        instances = {  # MIG devices; NVML counts none on a GPU without MIG
            f"{name} MIG {slot}": self.ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, board, slot)
            for name, board in boards.items()
            for slot in range(self.ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, board) or 0)
        }
        self.handles = boards | _known(instances)
        self.driver = self.ask(pynvml.nvmlSystemGetDriverVersion)
        version = self.ask(pynvml.nvmlSystemGetCudaDriverVersion)  # 12040 is CUDA 12.4
        self.cuda = None if version is None else f"{version // 1000}.{version % 1000 // 10}"
        self.devices: list[dict[str, Any]] = [
            {
                "device": name,
                "type": self.ask(pynvml.nvmlDeviceGetName, handle),
                "memory_gib": self._gib(handle, "total"),
                "bus": self.ask(pynvml.nvmlDeviceGetPciInfo, handle, part="busId"),
            }
            for name, handle in self.handles.items()
        ]
        self.topology = self._topology(boards)

    def ask(self, query: Callable[..., Any], *arguments: Any, part: str = "") -> Any:
        """The result of a query, or one attribute of it; None if the driver does not support it."""
        try:
            answer = query(*arguments)
        except self.nvml.NVMLError:
            return None
        return getattr(answer, part) if part else answer

    def read(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Utilisation in percent and used memory in GiB, by device. Raises NVMLError if no device reports either."""
        use, memory = {}, {}
        for name, handle in self.handles.items():
            use[name] = self.ask(self.nvml.nvmlDeviceGetUtilizationRates, handle, part="gpu")
            memory[name] = self._gib(handle, "used")
        if not (_known(use) or _known(memory)):
            self.nvml.nvmlDeviceGetMemoryInfo(next(iter(self.handles.values())))  # raises the reason
        return use, memory

    def _gib(self, handle: Any, part: str) -> float | None:
        """Memory of a device in GiB, "total" or "used"."""
        size = self.ask(self.nvml.nvmlDeviceGetMemoryInfo, handle, part=part)
        return None if size is None else size / GIB

    def _topology(self, boards: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """The connection of each two GPUs, as `nvidia-smi topo -m` prints it."""
        links = {name: self._links(board) for name, board in boards.items()}
        buses = {device["device"]: device["bus"] for device in self.devices}

        def word(one: str, other: str) -> str:
            if one == other:
                return "X"
            straight = links[one].count(buses[other]) if buses[other] else 0
            # On an NVSwitch all links of a GPU end at the switch, which connects it to every other GPU.
            count = straight or min(links[one].count("switch"), links[other].count("switch"))
            if count:
                return f"NV{count}"
            level = self.ask(self.nvml.nvmlDeviceGetTopologyCommonAncestor, boards[one], boards[other])
            return ANCESTORS.get(level, "?")

        return {one: {other: word(one, other) for other in boards} for one in boards}

    def _links(self, board: Any) -> list[str | None]:
        """The other end of each active NVLink of the board: a GPU's bus, or "switch"."""
        ends = []
        for link in range(self.nvml.NVML_NVLINK_MAX_LINKS):
            if self.ask(self.nvml.nvmlDeviceGetNvLinkState, board, link):
                kind = self.ask(self.nvml.nvmlDeviceGetNvLinkRemoteDeviceType, board, link)
                bus = self.ask(self.nvml.nvmlDeviceGetNvLinkRemotePciInfo, board, link, part="busId")
                ends.append("switch" if kind == self.nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH else bus)
        return ends


def _known(answers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: answer for name, answer in answers.items() if answer is not None}


class Host:
    """This machine's processors, memory and one disk, read by psutil. In a container memory is its own limit."""

    def __init__(self) -> None:
        import psutil

        self.psutil = psutil
        self.cores = psutil.cpu_count()
        psutil.cpu_percent()  # the first call in a thread returns 0

    def read(self, folder: Path) -> dict[str, float]:
        """Use of processors, memory and the disk of `folder` in percent; the last two also in GiB, used and total."""
        memory = self.psutil.virtual_memory()
        disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
        figures = {"CPU": self.psutil.cpu_percent()}
        for name, (used, total) in {
            "memory": container_memory() or (memory.total - memory.available, memory.total),
            "disk": (disk.used, disk.total),
        }.items():
            figures |= {name: 100 * used / total, f"{name} GiB": used / GIB, f"{name} total GiB": total / GIB}
        return figures


def container_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """(used, limit) memory of this container in bytes, without cached files; None if there is no limit."""
    for folder, limit_file, used_file, cache in (  # cgroups version 2, then 1
        (cgroups, "memory.max", "memory.current", "inactive_file"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = (int((folder / file).read_text()) for file in (limit_file, used_file))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < 2**60:  # version 1 says "no limit" with a number near 2**63
            return max(0, used - int(statistics.get(cache, 0))), limit
    return None


# --- the run's files ----------------------------------------------------------------------------------


class Lines:
    """Reads each line of a growing file of JSON objects once."""

    def __init__(self, file: Path):
        self.file, self.offset, self.inode = file, 0, 0

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file was replaced, the new objects). An incomplete last line is read by a later call."""
        if not self.file.exists():
            return False, []
        with open(self.file, "rb") as stream:
            status = os.fstat(stream.fileno())
            # A resumed run replaces the file by a shorter one.
            replaced = status.st_ino != self.inode or status.st_size < self.offset
            self.inode, self.offset = status.st_ino, 0 if replaced else self.offset
            stream.seek(self.offset)
            content = stream.read()
        content = content[: content.rfind(b"\n") + 1]
        self.offset += len(content)
        entries = []
        for line in content.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and number(entry.get("step")) is not None:
                    entries.append(entry)
        return replaced, entries


class Run:
    """The metrics.jsonl and samples.jsonl of a run so far, one JSON object a line.

    {"step": 10, "max_steps": 797, "epoch": 0.01, "seconds": 12.3, "loss": 1.9, "tokens_per_second": 9000.0, ...}
    {"step": 100, "max_steps": 797, "epoch": 0.13, "seconds": 80.1, "eval_loss": 1.5}
    {"step": 100, "epoch": 0.13, "instruction": "Name a river.", "input": "", "response": "The Rhine"}
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics, self.samples = Lines(folder / "metrics.jsonl"), Lines(folder / "samples.jsonl")
        self._forget_metrics()
        self.evaluation: dict[str, Any] = {}  # figures of the finished model by name
        self.answers: dict[float, dict[str, str]] = {}  # step -> prompt -> answer
        self.epochs: dict[float, float | None] = {}  # step -> epoch

    def _forget_metrics(self) -> None:
        self.loss, self.speed = Series(1), Series(1)
        self.last: dict[str, float] = {}  # the latest value of each figure
        self.pace: deque[tuple[float, float]] = deque(maxlen=20)  # (step, seconds) of the latest lines

    def read(self) -> None:
        """Reads new lines. Raises OSError if a file exists and cannot be read."""
        replaced, entries = self.metrics.new()
        if replaced:
            self._forget_metrics()
        for entry in entries:
            step = float(entry["step"])
            self.loss.add(step, {"loss": entry.get("loss"), "held-out loss": entry.get("eval_loss")})
            self.speed.add(step, {"tokens/s": entry.get("tokens_per_second")})
            figures = _known({name: number(value) for name, value in entry.items()})
            self.last |= figures
            if "seconds" in figures and (not self.pace or step > self.pace[-1][0]):
                self.pace.append((step, figures["seconds"]))
        replaced, entries = self.samples.new()
        if replaced:
            self.answers, self.epochs = {}, {}
        for entry in entries:
            self._take_answer(entry)
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            self.evaluation = dict(
                json.loads((self.folder / "evaluation.json").read_text())["held_out"]["metrics"]
            )

    def _take_answer(self, entry: Mapping[str, Any]) -> None:
        step = float(entry["step"])
        prompt = _prompt_text(entry)
        stage = self.answers.setdefault(step, {})
        self.epochs[step] = number(entry.get("epoch"))
        if prompt in stage or len(stage) < PROMPTS:
            stage[prompt] = _cut(str(entry.get("response", "")))

    def progress(self) -> tuple[int, str, str]:
        """(percent, text of the latest figures, text of the time left at the latest pace)."""
        step, steps = self.last.get("step", 0.0), self.last.get("max_steps", 0.0)
        text = f"step {step:,.0f} of {steps:,.0f}" if steps else f"step {step:,.0f}"
        forms = {
            "epoch": ", epoch {:.2f}",
            "loss": ", loss {:.3g}",
            "eval_loss": ", held-out loss {:.3g}",
            "tokens_per_second": ", {:,.0f} tokens/s",
        }
        text += "".join(form.format(self.last[name]) for name, form in forms.items() if name in self.last)
        left = "finished" if steps and step >= steps else "time left not known yet"
        if self.pace and steps > step:
            latest, now = self.pace[-1]
            first, begin = self.pace[0] if len(self.pace) > 1 else (0.0, 0.0)  # or since the run began
            if latest > first:
                left = f"{duration((steps - step) * (now - begin) / (latest - first))} left"
        return (int(min(100, 100 * step / steps)) if steps else 0), text, left

    def evaluation_table(self) -> tuple[list[str], list[list[str]]]:
        """(headers, rows) of evaluation.json: base and tuned model and their difference, with 95% intervals."""
        names = ("base", "tuned", "difference")
        rows = []
        for metric, figures in self.evaluation.items():
            texts = []
            for name in names:
                interval = _known({end: number(value) for end, value in (figures.get(name) or {}).items()})
                whole = interval.keys() >= {"value", "low", "high"}
                texts.append("{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval) if whole else "")
            rows.append([metric.replace("_", " "), *texts])
        return ["held-out rows", *names], rows

    def stages(self) -> list[float]:
        """The steps whose answers are shown: the first, the last, and some evenly between."""
        steps = sorted(self.answers)
        last, gaps = len(steps) - 1, min(len(steps), STAGES_SHOWN) - 1
        return [steps[round(n * last / max(1, gaps))] for n in range(gaps + 1)]

    def answer_table(self) -> tuple[list[str], list[Any]]:
        """(headers, rows): one row per instruction, one column per stage."""
        stages = self.stages()
        # Headers do not wrap, so epochs are preferred if they distinguish all stages.
        epochs = [f"epoch {epoch:.2f}" for epoch in map(self.epochs.get, stages) if epoch is not None]
        names = epochs if len(set(epochs)) == len(stages) else [f"step {step:,.0f}" for step in stages]
        shown = [self.answers[step] for step in stages]
        prompts = list(dict.fromkeys(prompt for stage in shown for prompt in stage))[:PROMPTS]
        return ["instruction", *names], [[p, *(stage.get(p, "") for stage in shown)] for p in prompts]


# --- charts and text ----------------------------------------------------------------------------------


def chart_spec(
    title: str, rows: Rows, names: list[str], x: str, y: str, top: float | None = None, zero: bool = False
) -> dict[str, Any]:
    """A Vega-Lite chart with a line for the mean of each name, and a pale line for maxima above the mean."""
    scale = {"zero": zero} if top is None else {"domain": [0, top]}
    legend = {"symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 3}
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": x, "scale": {"zero": False, "nice": False}},
        "y": {"field": "value", "type": "quantitative", "title": y, "scale": scale},
        "color": {"field": "name", "type": "nominal", "title": None, "sort": names, "legend": legend},
    }

    def layer(fields: list[str], name: str, **mark: Any) -> dict[str, Any]:
        folded = {"fold": fields, "as": ["field", "value"]}
        steps = [folded, {"filter": "isValid(datum.value)"}, {"calculate": name, "as": "name"}]
        return {"transform": steps, "mark": {"type": "line", "tooltip": True, **mark}}

    maxima = [f"max {name}" for name in names if any(f"max {name}" in row for row in rows)]
    layers = [layer(maxima, "slice(datum.field, 4)", strokeWidth=1, opacity=0.35)] if maxima else []
    keep = {"x", *names, *maxima}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": title,
        "height": 220,
        "data": {"values": [{name: row[name] for name in row if name in keep} for row in rows]},
        "encoding": encoding,
        "layer": [*layers, layer(names, "datum.field", strokeWidth=2, point=len(rows) <= 40)],
    }


def duration(seconds: float) -> str:
    """Formats seconds as "12 s", "5 min" or "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def time_unit(seconds: float) -> tuple[str, float]:
    """(axis title, seconds per unit) for a step of this length."""
    unit, scale = ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
    if seconds < 300:
        unit, scale = "seconds", 1.0
    return f"{unit} since the step began", scale


def error_text(error: BaseException | str | None) -> str:
    """The error with its traceback. A long one is cut to its last lines."""
    text = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else str(error)
    lines = text.rstrip().splitlines()
    return "\n".join(["..."] * (len(lines) > ERROR_LINES) + [line[:500] for line in lines[-ERROR_LINES:]])


def _figure(value: float | None, form: str) -> str:
    return "?" if value is None else form.format(value)


def _prompt_text(entry: Mapping[str, Any]) -> str:
    """The prompt of a line of samples.jsonl. A conversation keeps its end, which has the question."""
    text = "\n".join(str(entry[name]) for name in ("instruction", "input") if entry.get(name))
    turns = [f"{turn['role']}: {turn['content']}" for turn in entry.get("history") or ()]
    if not turns:
        return _cut(text)
    text = "\n".join([*turns, f"user: {text}"])
    return text if len(text) <= ANSWER_CHARACTERS else "…" + text[1 - ANSWER_CHARACTERS :]


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER_CHARACTERS else text[: ANSWER_CHARACTERS - 1] + "…"


# --- the profiler -------------------------------------------------------------------------------------


class Profiler:
    """Samples in one thread and draws in another, so that a slow card makes no gap in the curves.

    Args:
        card: `current.card[ID]`.
        title: Markdown of the first line.
        interval: seconds between two samples.
        folder: returns the folder of the run, or None while it is not set.
    """

    def __init__(self, card: Any, title: str, interval: float, folder: Callable[[], Path | None]):
        self.card, self.title, self.interval, self.folder = card, title, interval, folder
        self.began = time.monotonic()
        self.ended: float | None = None
        self.error: BaseException | str | None = None
        self.errors: dict[str, str] = {}  # the latest error of each part
        self.gpus: Gpus | None = None
        self.host: Host | None = None
        self.run: Run | None = None
        self.use, self.memory, self.machine = Series(interval), Series(interval), Series(interval)
        self.count = 0
        self.parts: dict[str, tuple[object, Any]] = {}  # key in the card -> state and component
        self.shown: list[Any] = []
        self.lock, self.halt = threading.Lock(), threading.Event()
        self.sampler = threading.Thread(target=self._sample, daemon=True, name="gpu_profile samples")
        self.painter = threading.Thread(target=self._paint, daemon=True, name="gpu_profile card")

    def start(self) -> None:
        self.sampler.start()
        self.painter.start()

    def stop(self, error: BaseException | str | None) -> dict[str, Any]:
        """Ends both threads, draws the last figures and returns the profile. `error`: why the step failed."""
        if self.ended is None:
            self.ended, self.error = time.monotonic(), error
            self.halt.set()
            self.sampler.join(timeout=10)  # a hanging driver must not block the step
            self.painter.join(timeout=60)
            if self.painter.is_alive():
                self.errors["card"] = "the last refresh did not end within 60 s"
            else:
                with self.record_errors("card"):
                    self.draw()
                    # Metaflow draws the card a last time only if the step succeeds. The second refresh waits for the
                    # process of an earlier one.
                    for _ in range(0 if error is None else 2):
                        self.card.refresh(force=True)
        with self.lock:
            return self._record()

    def seconds(self) -> float:
        """Seconds since the step began, until its end."""
        return (self.ended or time.monotonic()) - self.began

    @contextlib.contextmanager
    def record_errors(self, part: str) -> Iterator[None]:
        """Catches errors of the profile. The card shows the latest one of each part."""
        try:
            yield
        except Exception as error:
            self.errors[part] = _cut(f"{type(error).__name__}: {error}")

    # --- the profiler: samples ---

    def _sample(self) -> None:
        with self.record_errors("GPUs"):
            self.gpus = Gpus()
        with self.record_errors("host"):
            self.host = Host()
        due = time.monotonic()
        while not self.halt.wait(max(0.0, due - time.monotonic())):
            due = max(due + self.interval, time.monotonic())  # missed samples are skipped
            self.sample(self.seconds())

    def sample(self, seconds: float) -> None:
        """Reads every device once."""
        if self.gpus:
            with self.record_errors("GPUs"):
                use, memory = self.gpus.read()
                with self.lock:
                    self.use.add(seconds, use)
                    self.memory.add(seconds, memory)
        if self.host:
            folder = Path.cwd()  # its disk is measured
            with self.record_errors("run folder"):
                folder = self.folder() or folder
            with self.record_errors("host"):
                figures = self.host.read(folder)
                with self.lock:
                    self.machine.add(seconds, figures)
        self.count += 1

    def _record(self) -> dict[str, Any]:
        """The profile as an artifact."""
        curves = {"gpu_utilisation_percent": self.use, "gpu_memory_gib": self.memory, "host": self.machine}
        return {
            "seconds": self.seconds(),
            "interval": self.interval,
            "samples": self.count,
            "driver": self.gpus.driver if self.gpus else None,
            "cuda": self.gpus.cuda if self.gpus else None,
            "devices": self.gpus.devices if self.gpus else [],
            "topology": self.gpus.topology if self.gpus else {},
            **{name: series.rows() for name, series in curves.items()},
            "peaks": {name: series.peaks() for name, series in curves.items()},
            "faults": dict(self.errors),
        }

    # --- the profiler: its card ---

    def _paint(self) -> None:
        drawn, wait = 0.0, 1.0
        while not self.halt.wait(wait):
            since = self.seconds()
            wait = min(REFRESH_SECONDS, max(3.0, since / 4))  # shorter at first, for a user who waits
            with self.record_errors("card"):
                if _card_process_runs(self.card):
                    continue  # do not add load to a busy machine
                changed = self.draw()
                # A plain refresh only updates a browser that shows the card. `card view` and `card get` need a complete
                # drawing, which starts two processes, so it is rare.
                complete = changed or since - drawn > min(300.0, max(30.0, since / 10))
                drawn = since if complete else drawn
                self.card.refresh(force=complete)

    def draw(self) -> bool:
        """Updates the card's components. Returns whether components were added or replaced."""
        with self.record_errors("run"):
            folder = self.folder()
            if folder is not None and (self.run is None or self.run.folder != folder):
                self.run = Run(folder)
            if self.run is not None:  # after sys.exit the flow has no attributes
                self.run.read()
        layout: list[Any] = []
        for section in (self._status, self._training, self._devices):
            with self.lock, self.record_errors("card"):
                layout += section()
        if [id(part) for part in layout] == [id(part) for part in self.shown]:
            return False
        self.card.clear()
        self.card.extend(layout)
        self.shown = layout
        return True

    def _status(self) -> Iterator[Any]:
        yield self.markdown(self.title)
        state = "runs" if self.ended is None else "has ended" if self.error is None else "has failed"
        yield self.markdown(f"The step {state}: {duration(self.seconds())}, {self.count:,} samples", "state")
        if self.error is not None:
            yield self.markdown("## The step failed")
            yield self.part("error", lambda: PythonCode(code_string=error_text(self.error)))
        errors = [[part, text] for part, text in dict(self.errors).items() if part != "GPUs" or self.gpus]
        if errors:
            yield self.markdown("**Errors of the profile** (they do not affect the step)")
            yield self.table("errors", ["part", "error"], errors)

    def _training(self) -> Iterator[Any]:
        if self.run is None:
            return
        yield self.markdown("## Training")
        if self.run.last:
            percent, text, left = self.run.progress()
            yield self.markdown(text, "run state")
            bar = self.part("bar", lambda: ProgressBar(max=100, label="training", unit="%"))
            bar.update(percent, left)
            yield bar
            yield from self.chart("loss", self.run.loss, ("step", 1.0), "loss")
            yield from self.chart("speed", self.run.speed, ("step", 1.0), "tokens/s", zero=True)
        else:
            yield self.markdown("No metrics yet: metrics.jsonl is missing or empty.", "run state")
        headers, rows = self.run.evaluation_table()
        if rows:
            yield self.markdown("## Evaluation", "evaluation head")
            yield self.table("evaluation", headers, rows)
        headers, rows = self.run.answer_table()
        if rows:
            shown, stages = len(self.run.stages()), len(self.run.answers)
            note = f": {shown} of {stages} stages" if shown < stages else ""
            yield self.markdown(f"## Answers{note}", "answers head")
            # String cells are shown literally; Markdown would render HTML in a model's answer.
            yield self.table("answers", headers, rows)

    def _devices(self) -> Iterator[Any]:
        yield self.markdown("## Devices")
        gpus = self.gpus
        if gpus:
            cuda = f"CUDA {gpus.cuda or '?'} (the newest that this driver runs)"
            yield self.markdown(f"Driver {gpus.driver or '?'}, {cuda}", "driver")
        elif "GPUs" in self.errors:
            title, reason = "No NVIDIA GPU", self.errors["GPUs"]
            if "host" in self.errors and not self.host:
                title, reason = "**No device can be read**", f"{reason}; {self.errors['host']}"
            yield self.markdown(f"{title}: `{' '.join(reason.replace('`', chr(39)).split())}`", "no gpu")
        yield from self._device_table()
        since = time_unit(self.seconds())
        largest = max((device["memory_gib"] or 0 for device in gpus.devices), default=0) if gpus else 0
        yield from self.chart("GPU utilisation", self.use, since, "%", top=100.0)
        yield from self.chart("GPU memory", self.memory, since, "GiB", top=largest or None, zero=True)
        yield from self.chart("host", self.machine, since, "%", top=100.0)
        if gpus and len(gpus.topology) > 1:
            yield self.markdown("## How the GPUs are connected")
            matrix = [[name, *words.values()] for name, words in gpus.topology.items()]
            yield self.table("links", ["", *gpus.topology], matrix)
            yield self.markdown(LEGEND)

    def _device_table(self) -> Iterator[Any]:
        """A row per device with mean and peak use. Metaflow updates only Markdown cells of a table."""
        rows: list[tuple[str, str, Series, float | None, float | None]] = []
        for device in self.gpus.devices if self.gpus else ():
            name, kind = device["device"], f"{device['type'] or '?'}, {device['bus'] or '?'}"
            rows.append((name, kind, self.use, self.memory.peak(name), device["memory_gib"]))
        kinds = {"CPU": f"{self.host.cores} cores", "memory": "host", "disk": ""} if self.host else {}
        for name, kind in kinds.items():
            used, total = self.machine.peak(f"{name} GiB"), self.machine.peak(f"{name} total GiB")
            rows.append((name, kind, self.machine, used, total))
        cells = []
        for name, kind, use, peak, total in rows:
            gib = "" if name == "CPU" else f"{_figure(peak, '{:.1f}')} of {_figure(total, '{:.1f}')} GiB"
            texts = [_figure(use.mean(name), "{:.0f} %"), _figure(use.peak(name), "{:.0f} %"), gib]
            cells.append([name, kind, *(self.markdown(text, f"{name} {n}") for n, text in enumerate(texts))])
        if cells:
            yield self.table("devices", ["device", "type", "mean use", "peak use", "peak memory"], cells)

    def chart(self, title: str, series: Series, x: tuple[str, float], y: str, **axis: Any) -> Iterator[Any]:
        """A chart over x = (title, scale); none before the first figure."""
        # The host's sizes in GiB are only in the table.
        names = [name for name in series.names() if "GiB" not in name]
        if names:
            title_of_x, scale = x
            spec = chart_spec(title, series.rows(scale), names, title_of_x, y, **axis)
            part = self.part(title, lambda: VegaChart(spec))
            part.update(spec)
            yield part

    def table(self, key: str, headers: list[str], rows: list[Any]) -> Any:
        return self.part(key, lambda: Table(rows, headers=headers), (headers, rows))

    def markdown(self, text: str, key: str = "") -> Any:
        """A Markdown component; without `key` the constant text is the key."""
        part = self.part(key or text, lambda: Markdown(text))
        part.update(text)
        return part

    def part(self, key: str, make: Callable[[], Any], state: object = None) -> Any:
        """The card component of that key. It is made once, and again if `state` has changed."""
        if key not in self.parts or self.parts[key][0] != state:
            self.parts[key] = (state, make())
        return self.parts[key][1]


def _card_process_runs(card: Any) -> bool:
    """Whether the process of the last refresh still runs. Metaflow would then drop the next refresh."""
    with contextlib.suppress(Exception):  # internals of Metaflow, which may change
        from metaflow.plugins.cards.card_creator import CardProcessManager

        process, _ = CardProcessManager._get_card_process(card._card_creator_args["card_uuid"])
        return process is not None and process.poll() is None
    return False


# --- the decorator ------------------------------------------------------------------------------------


@user_step_decorator
def _profiled(step_name: str, flow: Any, inputs: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    profiler, failure = _begin(flow, attributes), None
    try:
        yield
    except Exception as error:
        failure = error
        raise
    finally:
        if profiler is not None:
            _end(profiler, flow, step_name, failure)


def _begin(flow: Any, attributes: Mapping[str, Any]) -> Profiler | None:
    """Starts a profiler. Returns None if that fails."""
    name = attributes.get("run_folder")

    def folder() -> Path | None:
        path = getattr(flow, name, None) if name else None
        return Path(path) if path else None

    try:
        card, title = current.card[CARD], f"# `{current.pathspec}`"
        profiler = Profiler(card, title, float(attributes["interval"]), folder)
        profiler.start()
        # sys.exit in a step skips every decorator.
        atexit.register(profiler.stop, "The step ended early, by sys.exit or an interruption.")
    except Exception as error:
        print(f"@gpu_profile: this step runs without its profile: {error!r}", file=sys.stderr)
        return None
    return profiler


def _end(profiler: Profiler, flow: Any, step_name: str, error: BaseException | None) -> None:
    try:
        record = profiler.stop(error)
        atexit.unregister(profiler.stop)
        # Each task needs its own name, or a join could not merge the artifacts.
        indices = [str(frame[0]) for frame in flow.foreach_stack() or ()]
        setattr(flow, "_".join(["gpu_profile", step_name, *indices]), record)
    except Exception as failure:
        print(f"@gpu_profile: the profile of this step is lost: {failure!r}", file=sys.stderr)


class gpu_profile(StepMutator):  # noqa: N801 - named as decorators are
    """Adds the card and its profiler to a step.

    Args:
        interval: seconds between two samples, 0.1 or more.
        run_folder: name of the flow's attribute that holds the folder of a run. Its curves and answers are drawn.

    The profile is also an artifact: gpu_profile_STEP, and gpu_profile_STEP_N in task N of a foreach.
    """

    def init(self, interval: float = 1.0, run_folder: str | None = None) -> None:
        if number(interval) is None or interval < 0.1:
            raise MetaflowException(
                f"@gpu_profile: interval is {interval!r}; expected seconds, 0.1 or more. Type interval=1.0"
            )
        if run_folder is not None and not str(run_folder).isidentifier():
            raise MetaflowException(
                f"@gpu_profile: run_folder is {str(run_folder)!r}; expected the name of the attribute that holds "
                'the folder. Type run_folder="output" for self.output'
            )
        self.attributes = {"interval": float(interval)} | ({"run_folder": run_folder} if run_folder else {})

    def mutate(self, mutable_step: Any) -> None:
        # refresh_interval=0: the profiler has its own, and Metaflow's drops the last refresh of a failed step.
        mutable_step.add_decorator("card", deco_kwargs={"type": "blank", "id": CARD, "refresh_interval": 0})
        mutable_step.add_decorator(_profiled, deco_kwargs=self.attributes)


# --- live cards ---------------------------------------------------------------------------------------


def main() -> None:
    """Serves the cards of a flow live at http://127.0.0.1:8324, for this machine only.

    It is Metaflow's card server, which by itself listens on all networks. Arguments: the flow's file, and options of
    `card server`.
    """
    from metaflow.plugins.cards import card_server

    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("Type python gpu_profile.py FLOW.py [--run-id ID] [--port PORT]")

    server = card_server.ThreadingHTTPServer
    card_server.ThreadingHTTPServer = lambda address, routes: server(("127.0.0.1", address[1]), routes)
    flow = str(Path(sys.argv[1]).resolve())
    sys.argv = [flow, "card", "server", *sys.argv[2:]]
    sys.path.insert(0, str(Path(flow).parent))
    runpy.run_path(flow, run_name="__main__")


if __name__ == "__main__":
    main()
