"""What a run asks of a model until its end is asked of a small copy first, and each failure is a reason in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from training.errors import ModelError
from training.model import trial
from training.model.packing import Packing, compare_packed_with_alone, packing_of
from training.model.trial import try_model
from training.model.twin import shrunken_twin

PADDED = Packing("padded rows were requested")


def tried(kind: str, packing: Packing = PADDED, **changes: Any) -> Packing:
    return try_model("my-model", AutoConfig.for_model(kind, **changes), packing, grows=True)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bert", {}, 'its tokens see later ones, as in an encoder; if it was trained as a decoder, set "is_decoder"'),
        ("gpt_neox", {"hidden_size": 64, "num_attention_heads": 4, "layer_norm_eps": float("nan")}, "its logits are not finite"),
        ("xlnet", {}, "its tokens see later ones"),
        ("moshi", {"audio_vocab_size": 32}, "stock transformers loads another model than was saved (its files hold"),
        ("xlstm", {"num_heads": 8}, "its embedding cannot grow by the control tokens (AttributeError"),
        ("bart", {"encoder_layers": 1, "decoder_layers": 3}, "what is saved does not work in stock transformers (IndexError"),
    ],
)  # fmt: skip
def test_a_model_that_could_not_be_trained_to_its_end_is_refused_with_the_reason(
    kind: str, changes: dict, reason: str
) -> None:
    with pytest.raises(ModelError) as error:
        tried(kind, **changes)
    message = str(error.value)
    assert message.startswith(f"my-model: a {kind} model cannot be trained here: ")
    assert reason in message
    assert message.endswith(". Name another base model")


def test_a_model_whose_own_loss_is_not_of_the_next_tokens_gets_ours() -> None:
    assert tried("bart").padded_loss
    assert not tried("opt", word_embed_proj_dim=768).padded_loss


def test_rows_end_before_the_positions_that_a_table_keeps_for_padding() -> None:
    roberta = tried("roberta", is_decoder=True, pad_token_id=1, max_position_embeddings=514)
    assert (roberta.lost_positions, roberta.row_limit(514)) == (2, 512)
    assert Packing(None).row_limit(2047) == 2047
    assert PADDED.row_limit(2047) == 2040, "a padded row's width is a multiple of 8"


def test_the_trial_leaves_the_random_state_and_adds_only_whether_blocks_are_units() -> None:
    config = LlamaConfig()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    packing = packing_of(config)
    assert packing == Packing(response_loss=True)
    assert try_model("my-model", config, packing, grows=True) == replace(packing, whole_blocks=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("save_model", "it cannot be saved (ValueError: planted)"),
        ("load_stock", "what is saved does not work in stock transformers (ValueError: planted)"),
        ("answer_problems", "generate() of stock transformers fails on it (ValueError: planted)"),
    ],
)
def test_what_fails_at_the_end_is_reported_at_the_start(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(trial, name, fails)
    with pytest.raises(ModelError) as error:
        tried("llama")
    assert reason in str(error.value)


@pytest.mark.parametrize("tokens", [1, 64], ids=["a share without rows", "a share of one row"])
def test_a_model_is_not_packed_if_it_fails_on_one_of_the_shapes_that_a_rank_can_get(tokens: int) -> None:
    class Picky(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            if "labels" in kwargs and input_ids.shape[1] == tokens:
                output.loss = output.loss + 1
            return output

    model: PreTrainedModel = shrunken_twin(LlamaConfig())
    model.__class__ = Picky
    assert "its loss of a packed row is" in str(compare_packed_with_alone(model).obstacle)
