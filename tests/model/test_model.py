"""Loading tokenizer and model: control tokens, the growing embedding, and refusal of broken or unsafe files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from training.data.encoding import encode_text
from training.data.rows import read_columns
from training.errors import DataError, ModelError
from training.model import demo_model
from training.model.demo_model import model_folder
from training.model.loading import load_config, load_model, max_positions
from training.model.tokenizer import load_tokenizer

KEYS = ["### End", "### Instruction:", "### Response:\n"]


def gptj(rows: int) -> PreTrainedModel:
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=rows, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    )


def gpt_neox(rows: int) -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=rows,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )


def gpt2_tied(rows: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=64, n_embd=16, n_layer=1, n_head=2))


def save(model: PreTrainedModel, bpe_folder: Path, folder: Path) -> str:
    model.save_pretrained(folder)
    GPT2TokenizerFast.from_pretrained(str(bpe_folder)).save_pretrained(folder)
    return str(folder)


def edited_copy(base_folder: Path, folder: Path, file: str = "config.json", **entries: object) -> str:
    """Copies the base folder and changes some entries of one of its JSON files."""
    shutil.copytree(base_folder, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return str(folder)


@pytest.fixture
def base(bpe_folder: Path) -> GPT2TokenizerFast:
    """The base model's tokenizer, without control tokens."""
    return GPT2TokenizerFast.from_pretrained(str(bpe_folder))


Load = Callable[..., PreTrainedModel]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase) -> Load:
    return lambda name, dtype=torch.float32, seed=42: load_model(str(name), tokenizer, dtype, seed)


# --- the tokenizer -----------------------------------------------------------------------------------


def test_the_control_tokens_follow_the_base_vocabulary_in_dollys_order(
    base: GPT2TokenizerFast, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert [tokenizer.convert_tokens_to_ids(key) for key in KEYS] == [len(base) + n for n in range(3)]
    assert len(tokenizer) == len(base) + 3
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.get_vocab().items() >= base.get_vocab().items()


def test_special_tokens_of_the_base_tokenizer_stay_special(base: GPT2TokenizerFast, tmp_path: Path) -> None:
    base.add_special_tokens({"extra_special_tokens": ["<|own|>"]})
    base.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert set(tokenizer.all_special_tokens) >= {"<|own|>", *KEYS}
    assert tokenizer.convert_tokens_to_ids("### End") == len(base)


def test_a_control_token_that_is_an_ordinary_token_of_the_base_does_not_match_text(
    base: GPT2TokenizerFast, tmp_path: Path
) -> None:
    base.add_tokens(["### End"])
    base.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    end = tokenizer.convert_tokens_to_ids("### End")
    assert end == len(base) - 1
    assert end not in encode_text(tokenizer, ["a ### End b"])[0]


def test_the_tokenizer_of_a_trained_folder_loads_unchanged(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again, stock = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello\n\n### Instruction:\na\n\n### Response:\nb\n\n### End"
    assert again(text)["input_ids"] == stock(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(again) == len(stock) == len(tokenizer)
    assert stock.pad_token == stock.eos_token
    assert stock.chat_template == again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"},
         r"its tokenizer has no EOS token. Set eos_token in tokenizer_config.json"),
        ({"model_max_length": "long"}, "its tokenizer is broken"),
    ],
)  # fmt: skip
def test_a_tokenizer_without_eos_or_with_invalid_settings_is_refused(
    base_folder: Path, tmp_path: Path, entries: dict, message: str
) -> None:
    name = edited_copy(base_folder, tmp_path / "odd", "tokenizer_config.json", **entries)
    with pytest.raises(ModelError, match=f"^{name}: {message}"):
        load_tokenizer(name)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "T5Tokenizer", "GemmaTokenizer"])
def test_settings_of_a_tokenizer_without_its_vocabulary_are_refused(tmp_path: Path, kind: str) -> None:
    settings = {"tokenizer_class": kind, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    with pytest.raises(ModelError, match=r"its tokenizer has no vocabulary.* Copy tokenizer.json"):
        load_tokenizer(str(tmp_path))


def bare_bpe(bpe_folder: Path, folder: Path, last_id: int) -> str:
    """GPT-2's two files, with the last entry of the vocabulary moved to another id."""
    shutil.copytree(bpe_folder, folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = last_id
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return str(folder)


def test_a_vocabulary_with_a_duplicate_or_a_huge_id_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    size = len(json.loads((bpe_folder / "vocab.json").read_text()))
    with pytest.raises(ModelError, match=r"gives two tokens the same id"):
        load_tokenizer(bare_bpe(bpe_folder, tmp_path / "gap", size))  # the next free id by count is taken
    with pytest.raises(ModelError, match=r"the id 2,147,483,648, expected less than 16,777,216"):
        load_tokenizer(bare_bpe(bpe_folder, tmp_path / "huge", 2**31))  # its embedding would fill memory


def test_the_embedding_has_room_for_the_largest_id_when_ids_have_gaps(
    bpe_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(bare_bpe(bpe_folder, tmp_path / "gaps", 700))
    assert len(tokenizer) < 400
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42)
    assert len(model.get_input_embeddings().weight) == 701


# --- the embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [gptj, gpt_neox, gpt2_tied])
@pytest.mark.parametrize("spare", [-3, 0, 5])
def test_the_embedding_grows_to_fit_the_tokenizer_keeps_its_rows_and_never_shrinks(
    architecture: Callable[[int], PreTrainedModel],
    spare: int,
    bpe_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    load: Load,
    tmp_path: Path,
) -> None:
    rows, grown = len(tokenizer) + spare, max(len(tokenizer), len(tokenizer) + spare)
    name = save(architecture(rows), bpe_folder, tmp_path / "base")
    old = AutoModelForCausalLM.from_pretrained(name).state_dict()
    model = load(name)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert len(embedding) == len(head.weight) == model.config.vocab_size == grown
    for key, tensor in model.state_dict().items():
        larger = spare < 0 and tensor.shape != old[key].shape
        assert torch.equal(tensor[:rows] if larger else tensor, old[key]), key
    if head.bias is not None:
        assert len(head.bias) == grown
    if spare < 0:
        # Drawn like the others, as Dolly's were: transformers' own default would put all three at the rows' mean.
        assert 0.5 < embedding[rows:].std() / model.config.initializer_range < 2
    assert torch.isfinite(embedding).all()
    if architecture is gpt2_tied:
        assert head.weight is embedding
    assert max_positions(model.config) == 64
    # The saved model loads with stock transformers and computes the same.
    model.save_pretrained(tmp_path / "grown")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    ids = torch.tensor([[1, len(tokenizer) - 3, len(tokenizer) - 1]])
    assert torch.equal(model.eval()(ids).logits, again(ids).logits)


def test_the_new_embedding_rows_depend_only_on_the_seed(base_folder: Path, load: Load) -> None:
    def new_rows(seed: int) -> torch.Tensor:
        torch.rand(seed)  # earlier random numbers must not matter
        model = load(base_folder, seed=seed)
        return torch.cat([model.get_input_embeddings().weight[-3:], model.lm_head.weight[-3:]])

    assert torch.equal(new_rows(42), new_rows(42))
    assert not torch.equal(new_rows(42), new_rows(43))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_has_the_requested_precision(base_folder: Path, load: Load, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load(base_folder, dtype).parameters()} == {dtype}


# --- refusals ----------------------------------------------------------------------------------------


def cut_short(keep: int) -> Callable[[Path], None]:
    def damage(weights: Path) -> None:
        assert weights.stat().st_size > keep
        weights.write_bytes(weights.read_bytes()[:keep])

    return damage


def without_two_tensors(weights: Path) -> None:
    tensors = load_file(weights)
    del tensors["transformer.h.1.mlp.fc_in.weight"], tensors["lm_head.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})


def of_another_vocabulary(weights: Path) -> None:
    config = GPTJConfig.from_pretrained(weights.parent, vocab_size=300)
    GPTJForCausalLM(config).save_pretrained(weights.parent)


@pytest.mark.parametrize(
    ("damage", "entries", "message"),
    [
        (without_two_tensors, {}, r"2 tensors are missing .*: lm_head.bias, transformer.h.1.mlp.fc_in"),
        (Path.exists, {"n_layer": 3}, r"are missing from the weight files, the first: transformer\.h\.2\."),
        *((cut_short(keep), {}, "the weights could not be loaded") for keep in (0, 4, 1000, 20_000)),
        (Path.exists, {"n_embd": 64},
         r"24 tensors of the weight files .*: lm_head.weight \[\d+, 32\], expected \[\d+, 64\]"),
        (Path.unlink, {}, "Error no file named model.safetensors"),
        (of_another_vocabulary, {}, "tokens of its tokenizer, such as .* have ids beyond the 300 rows"),
        *((Path.exists, {name: value}, "") for name, value in
          [("n_positions", "many"), ("n_positions", [64]), ("architectures", 5), ("n_head", 0), ("n_layer", "2")]),
    ],
)  # fmt: skip
def test_broken_weights_or_a_broken_config_are_refused(
    base_folder: Path, load: Load, tmp_path: Path, damage: Callable[[Path], None], entries: dict, message: str
) -> None:
    name = edited_copy(base_folder, tmp_path / "odd", **entries)
    damage(tmp_path / "odd" / "model.safetensors")

    def load_all() -> None:
        max_positions(load_config(name))
        load(name)

    with pytest.raises(ModelError, match=f"^{name}: .*{message}"):
        load_all()


class Bomb:
    """A pickle that creates a file when it is loaded unsafely."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> object:
        return Path.touch, (self.file,)


def test_a_pickle_is_not_run(base_folder: Path, load: Load, tmp_path: Path) -> None:
    name = edited_copy(base_folder, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({"lm_head.bias": Bomb(tmp_path / "was_here")}, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="the weights could not be loaded"):
        load(name)
    assert not (tmp_path / "was_here").exists()
    torch.load(tmp_path / "pickle" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "was_here").exists()  # the unsafe way does run it


def test_a_name_that_is_not_found_offline_says_how_to_go_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages() -> list[str]:
        found = []
        for read, name in (
            (load_config, "nobody/no"),
            (read_columns, "nobody/no"),
            (load_config, str(tmp_path)),
        ):
            with pytest.raises((ModelError, DataError)) as error:
                read(name)
            found.append(str(error.value))
        return found

    advice = "HF_HUB_OFFLINE is set, so nothing is downloaded: type unset HF_HUB_OFFLINE"
    assert [advice in message for message in messages()] == [True, True, False]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not any(advice in message for message in messages())


def test_a_folder_without_a_model_is_refused(tmp_path: Path, bpe_folder: Path) -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"none: no such folder\. Name a folder with config.json"):
            load(str(tmp_path / "none"))
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(
            ModelError, match=r"no model could be found .* Expected a folder with config.json"
        ):
            load_config(name)
        with pytest.raises(ModelError, match="no tokenizer could be loaded"):
            load_tokenizer(name)
    for content, problem in (
        ("{", "not a valid JSON file"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "gptj", "n_layer": "2"}', "Field 'n_layer' expected int"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(
            ModelError,
            match=rf"its config.json cannot be used \(.*{problem}.*\)\. Correct it, or name another",
        ):
            load_config(str(tmp_path))


def test_models_that_attend_to_later_tokens_are_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 8, "num_layers": 1, "num_heads": 2, "d_model": 8, "d_kv": 4, "d_ff": 8}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    bert = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="a t5 model is not a causal language model"):
        load_config(str(tmp_path / "t5"))
    with pytest.raises(ModelError, match="a BertForMaskedLM is an encoder, not a causal language model"):
        load_config(str(tmp_path / "bert"))


def test_code_in_a_model_folder_runs_only_with_trust_remote_code(base_folder: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    name = edited_copy(base_folder, tmp_path / "own", auto_map=auto_map, model_type="own")
    executed = tmp_path / "was_here"
    (tmp_path / "own" / "own.py").write_text(
        f"open({str(executed)!r}, 'w').close()\n"
        "from transformers import GPTJConfig\n"
        "class OwnConfig(GPTJConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(
        ModelError, match=r"it brings its own code. .* add --trust-remote-code if you trust it$"
    ):
        load_config(name)
    load_tokenizer(name)  # needs none of the code
    assert not executed.exists()
    assert load_config(name, trust_remote_code=True).model_type == "own"
    assert executed.exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"n_layer": 10**10}, "num_hidden_layers is 10000000000, expected 1 to 1,000"),
        ({"n_layer": 0}, "num_hidden_layers is 0, expected 1 to 1,000"),
        ({"n_layer": -1}, "num_hidden_layers is -1, expected 1 to 1,000"),
        ({"vocab_size": 0}, "vocab_size is 0, expected 1 to"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"its weights are quantized \(gptq\)"),
    ],
)
def test_impossible_sizes_and_quantized_weights_are_refused_before_anything_is_built(
    base_folder: Path, tmp_path: Path, entries: dict, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(edited_copy(base_folder, tmp_path / "odd", **entries))


def test_an_adapter_without_its_base_is_refused_with_the_name_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "a/base"}'
    )
    (tmp_path / "adapter_model.safetensors").touch()
    for config in ("", "{}"):  # some come with a config.json
        if config:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(
            ModelError, match=r"it is a LoRA adapter, and its base cannot be used: a/base: no model"
        ):
            load_config(str(tmp_path))


def test_a_folder_without_tokenizer_files_is_refused_with_what_is_missing(
    base_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(base_folder / "config.json", tmp_path)
    with pytest.raises(
        ModelError, match=r"no tokenizer files in the folder \(tokenizer.json .*Copy those of its base"
    ):
        load_tokenizer(str(tmp_path))


def test_the_positions_of_a_config_may_have_another_name() -> None:
    assert max_positions(AutoConfig.for_model("mpt", max_seq_len=256)) == 256
    assert max_positions(AutoConfig.for_model("whisper", max_target_positions=448)) == 448
    assert max_positions(AutoConfig.for_model("xlnet")) == 1024, "its own is -1: there is no limit"


# --- the demo model ----------------------------------------------------------------------------------


def test_the_demo_model_is_written_completely_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:

    written: list[Path] = []

    def write(folder: Path) -> None:
        written.append(folder)
        shutil.copytree(base_folder, folder, dirs_exist_ok=True)
        if len(written) == 1:
            (folder / "model.safetensors").unlink()
            raise KeyboardInterrupt  # killed halfway

    monkeypatch.setattr(demo_model, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "save_demo_model", write)
    with pytest.raises(KeyboardInterrupt):
        model_folder("demo")
    first, second = model_folder("demo"), model_folder("demo")
    assert first == second
    assert len(written) == 2
    assert (Path(first) / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("(os error 28)")])
def test_a_demo_model_that_cannot_be_written_is_refused_with_the_fix_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(demo_model, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "save_demo_model", full)
    with pytest.raises(ModelError, match=f"cannot be written into {tmp_path} .*28.*export HF_HOME="):
        model_folder("demo")
    assert list((tmp_path / "dolly").iterdir()) == []
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(demo_model, "HF_HOME", str(tmp_path / "a_file"))
    with pytest.raises(ModelError, match=r"a_file \(NotADirectoryError"):
        model_folder("demo")


def test_other_model_names_are_returned_unchanged() -> None:
    assert model_folder("EleutherAI/gpt-j-6B") == "EleutherAI/gpt-j-6B"
