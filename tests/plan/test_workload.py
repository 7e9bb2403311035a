"""Model shapes, row lengths and the computation of an epoch, against hand-computed cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPTJConfig, GPTNeoXConfig, LlamaConfig, MambaConfig

from tests.conftest import jsonl, rows_of, settings_of_a_run
from training import consts
from training.consts import PAD_TO_MULTIPLE_OF
from training.data.tokens import prepare_dataset
from training.errors import DataError, OptionsError
from training.model.tokenizer import load_tokenizer
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import OPTIONS
from training.plan.epoch import (
    ALPACA_HISTOGRAM,
    ALPACA_RESPONSE_SHARE,
    ALPACA_ROWS,
    Lengths,
    alpaca_lengths,
    epoch_load,
    row_lengths,
)
from training.plan.lookup import dataset_lengths, model_shape
from training.plan.model_shape import gptj_shape, neox_shape

SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("EleutherAI/gpt-j-6B", 6_050_882_784),
        ("eleutherai/GPT-J-6b", 6_050_882_784),
        ("EleutherAI/pythia-70m", 70_426_624),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
        ("EleutherAI/pythia-12b-deduped", 11_846_072_320),
    ],
)
def test_built_in_models_have_the_parameter_counts_of_their_model_cards(name, parameters):
    assert model_shape(name).parameters == parameters


def test_the_shape_of_a_model_in_a_folder_comes_from_its_config(tmp_path):
    gptj, neox, llama = tmp_path / "gptj", tmp_path / "neox", tmp_path / "llama"
    GPTJConfig(vocab_size=100, n_positions=64, n_embd=8, n_layer=2, n_head=2, rotary_dim=4, bos_token_id=0, eos_token_id=0).save_pretrained(gptj)  # fmt: skip
    known = gptj_shape(str(gptj), layers=2, width=8, heads=2, vocabulary=100, positions=64)
    assert model_shape(str(gptj)) == replace(known, file_bytes=2 * known.parameters)
    (gptj / "model.safetensors").write_bytes(b"1234567")
    assert model_shape(str(gptj)).file_bytes == 7

    GPTNeoXConfig(vocab_size=96, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32).save_pretrained(neox)  # fmt: skip
    assert model_shape(str(neox)) == replace(neox_shape(str(neox), 3, 8, 2, 96))

    mamba = tmp_path / "mamba"
    MambaConfig(vocab_size=96, hidden_size=8, num_hidden_layers=2, state_size=4).save_pretrained(mamba)
    assert (model_shape(str(mamba)).heads, model_shape(str(mamba)).layers) == (1, 2)

    LlamaConfig(vocab_size=96, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, tie_word_embeddings=True).save_pretrained(llama)  # fmt: skip
    facts = model_shape(str(llama))
    # q, k, v, out 4 x 8 x 8; gate, up, down 3 x 8 x 20; three norms of 8. The head is the embedding.
    assert (facts.layer_parameters, facts.parameters) == (256 + 480 + 24, 256 + 480 + 24 + 96 * 8)
    assert (facts.gated, facts.inner) == (True, 20)


def test_the_built_in_demo_shape_matches_the_demo_model_plus_control_tokens():
    from training.plan.lookup import _shape_of_config

    known, built = model_shape("demo"), _shape_of_config("demo", False)
    added = 3 * (2 * known.width + 1)  # rows of embedding and head, and the head's bias
    assert known.parameters == built.parameters + added
    assert (known.layers, known.width, known.heads, known.positions, known.layer_parameters) == (
        built.layers, built.width, built.heads, built.positions, built.layer_parameters
    )  # fmt: skip


# --- rows --------------------------------------------------------------------------------------------


def test_built_in_row_lengths_match_alpacas_statistics():
    rows = alpaca_lengths().tokens
    assert len(rows) == 52_002
    assert rows.mean() == pytest.approx(106.7, rel=0.005)
    assert np.percentile(rows, 99) == pytest.approx(307, abs=8)
    assert rows.max() == pytest.approx(603, abs=8)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the Alpaca sample")
def test_the_built_in_histogram_matches_tokenised_alpaca_rows():
    tokenizer = load_tokenizer(str(SHARED / "gpt2-bpe"))
    rows, ledger = prepare_dataset(str(SHARED / "data/alpaca_1500.jsonl"), tokenizer, 2048)
    counted = row_lengths("alpaca", rows["length"][:], ledger.response_tokens)
    bins = np.bincount((counted.tokens - 1) // 8, minlength=len(ALPACA_HISTOGRAM))
    assert bins.tolist() == list(ALPACA_HISTOGRAM)
    assert counted.response_share == pytest.approx(ALPACA_RESPONSE_SHARE, abs=0.001)


def test_a_users_dataset_is_measured_by_row_lengths_and_response_share(tmp_path, base_folder):
    lengths = row_lengths("mine", [10, 30], 20)
    assert lengths.tokens.tolist() == [10, 30]
    assert lengths.response_share == 0.5
    rows = [row | {"instruction": "a" * n} for n, row in enumerate(rows_of(40), start=1)]
    file, model = jsonl(tmp_path / "rows.jsonl", rows), model_shape(str(base_folder))
    options = TrainingOptions(local_output_dir="x", training_dataset=file)
    lengths = dataset_lengths(options, model)
    assert len(lengths.tokens) == 40
    assert lengths.tokens[-1] > lengths.tokens[0]
    assert 0 < lengths.response_share < 0.5
    shorter = replace(options, max_length=int(lengths.tokens[-3]))
    assert len(dataset_lengths(shorter, model).tokens) == 38


def test_alpacas_rows_are_limited_to_the_longest_row_as_in_training():
    options, model = TrainingOptions(local_output_dir="x", max_length=301), model_shape("EleutherAI/gpt-j-6B")
    tokens = dataset_lengths(options, model).tokens
    assert tokens.max() == 293, "the middle of the last bin"
    assert 51_000 < len(tokens) < ALPACA_ROWS
    assert len(dataset_lengths(replace(options, keep_truncated=True), model).tokens) == ALPACA_ROWS
    advice = r"more than 100 tokens .* Raise --max-length to at most 2048, or raise --max-dropped-fraction"
    with pytest.raises(DataError, match=advice):
        dataset_lengths(replace(options, max_length=100), model)
    with pytest.raises(DataError, match=r"more than 10%\. Raise --max-dropped-fraction"):
        dataset_lengths(replace(options, max_length=None), replace(model, positions=100))
    with pytest.raises(OptionsError, match=r"a row of .* has at most 2048 tokens\. Type --max-length 2048"):
        dataset_lengths(replace(options, max_length=2049), model)


# --- an epoch ----------------------------------------------------------------------------------------


def test_the_load_of_an_epoch_matches_a_hand_computed_case():
    # Eight rows of ten tokens, four held out; two ranks of two rows make one step of the rest.
    lengths, settings = (
        Lengths("ten", np.full(8, 10), 0.5),
        settings_of_a_run(ranks=2, per_device_train_batch_size=2, test_size=4),
    )
    packed = epoch_load(lengths, settings)
    assert (packed.steps, packed.real_tokens, packed.computed_tokens, packed.peak_row) == (1, 40, 40, 10)
    assert packed.slowest_tokens == pytest.approx(20, rel=0.01)
    assert packed.slowest_scores == pytest.approx(2 * 10 * 10 / 2, rel=0.01)
    padded = epoch_load(lengths, replace(settings, batching="padded"))
    counted = (padded.computed_tokens, padded.slowest_tokens, padded.peak_tokens, padded.peak_row)
    assert counted == (64, 32, 32, 16), "padded as the collator does"
    assert PAD_TO_MULTIPLE_OF == consts.PAD_TO_MULTIPLE_OF
    assert padded.slowest_scores == 2 * 16 * 16


def test_all_ranks_wait_for_the_rank_with_the_longest_row():
    lengths = Lengths("one long row", np.array([8, 8, 8, 40]), 0.5)
    settings = settings_of_a_run(
        ranks=2, per_device_train_batch_size=1, gradient_accumulation_steps=1, batching="padded", test_size=1
    )
    padded = epoch_load(lengths, settings, seed=1)
    assert padded.paced_tokens >= padded.computed_tokens
    one_step = epoch_load(replace(lengths, tokens=np.array([40, 8, 8])), settings, seed=0)
    assert one_step.steps == 1
    assert one_step.peak_row == one_step.slowest_tokens


def test_fewer_rows_than_a_global_batch_make_one_step():
    load = epoch_load(Lengths("few", np.array([9, 9, 9]), 0.5), settings_of_a_run(ranks=8, test_size=1000))
    assert (load.steps, load.real_tokens) == (1, 18)


def test_half_of_dollys_padded_tokens_are_real_and_a_third_of_the_capacity_of_eight_ranks():
    def real(ranks: int) -> tuple[float, float]:
        load = epoch_load(alpaca_lengths(), settings_of_a_run(ranks=ranks, batching="padded"))
        return load.real_tokens / load.computed_tokens, load.real_tokens / load.paced_tokens

    assert real(1)[0] == pytest.approx(0.53, abs=0.03)
    assert real(8)[1] == pytest.approx(0.34, abs=0.03)
    packed = epoch_load(alpaca_lengths(), settings_of_a_run(ranks=8))
    assert packed.real_tokens / packed.paced_tokens > 0.99


def test_the_plan_takes_the_options_that_messages_about_rows_name() -> None:
    assert {"drop_unusable", "max_dropped_fraction", "max_length", "test_size"} <= set(OPTIONS)
