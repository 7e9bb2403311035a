"""Looks up model shapes and row lengths by model name and dataset name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from training.consts import DEFAULT_TRAINING_DATASET, DEMO, WEIGHTS
from training.errors import DataError, ModelError, first_line
from training.options.checks import check_max_length
from training.options.trainer_options import TrainingOptions
from training.plan.epoch import Lengths, alpaca_lengths, joined_lengths, row_lengths
from training.plan.model_shape import BUILT_IN, Linear, ModelShape, gptj_shape


def is_built_in(name: str) -> bool:
    """Whether the model's shape is known without its config. All of these can be packed, which a test checks."""
    return name == DEMO or name.lower() in BUILT_IN


def model_shape(name: str, trust_remote_code: bool = False) -> ModelShape:
    """Shape of a built-in model, the demo model, a folder with a config.json, or a model on the Hub (config only).

    Only the last two import torch. Raises ModelError if the model is not found or is not a causal language model.
    """
    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    if name == DEMO:
        from training.model.demo_model import SHAPE, VOCAB_SIZE

        vocabulary, positions = VOCAB_SIZE + 3, SHAPE["n_positions"]  # with the control tokens
        return gptj_shape(DEMO, SHAPE["n_layer"], SHAPE["n_embd"], SHAPE["n_head"], vocabulary, positions)
    return _shape_of_config(name, trust_remote_code)


def _shape_of_config(name: str, trust_remote_code: bool) -> ModelShape:
    """Shape from transformers' config and the parameters of a model on the meta device."""
    from training.machine.flops import model_parameters
    from training.model.adapter_files import find_adapter
    from training.model.blocks import block_parameters
    from training.model.loading import embedding_rows, load_config, max_positions, text_config
    from training.model.twin import meta_model

    config = load_config(name, trust_remote_code)
    try:
        model = meta_model(config, trust_remote_code)
        text, folder, head = text_config(config), Path(name), model.get_output_embeddings()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        sizes = [getattr(text, key, None) for key in ("intermediate_size", "n_inner", "ffn_dim")]
        inner = next(filter(None, sizes), 4 * text.hidden_size)
        if isinstance(inner, list):  # one size for each layer
            inner = max(inner)
        if adapter := find_adapter(name):
            folder = Path(adapter.base)  # its weights are what is read
        files = [file for kind in (f"*{WEIGHTS}", "*.bin") for file in folder.glob(kind)]
        return ModelShape(
            name=name,
            kind=config.model_type,
            parameters=parameters,
            layer_parameters=model_parameters(model)[0],
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=getattr(text, "num_attention_heads", None) or 1,  # a recurrent model has none
            inner=inner,
            vocabulary=embedding_rows(model),
            positions=max_positions(config),
            file_bytes=sum(file.stat().st_size for file in files) or 2 * parameters,
            downloaded=not folder.is_dir(),
            checkpointing=model.supports_gradient_checkpointing,
            block=block_parameters(model),
            gated=any("gate_proj" in part for part, _ in model.named_modules()),
            linears=_linears(model),
            tied=head is not None and head.weight is model.get_input_embeddings().weight,
            head_bias=getattr(head, "bias", None) is not None,
        )
    except Exception as error:  # of torch or transformers, for sizes that are no sizes
        raise ModelError(
            f"{name}: no model can be built from its config.json ({first_line(error)}). Correct its sizes"
        ) from error


def _linears(model: Any) -> tuple[Linear, ...]:
    """The linear layers of a model's blocks, which get adapters (model/adapter.py)."""
    from training.model.adapter import target_layers

    linears = []
    for name in target_layers(model):
        layer = model.get_submodule(name)
        is_conv1d = hasattr(layer, "nf")  # transformers' Conv1D has its weight as (inputs, outputs)
        inputs, outputs = layer.weight.shape if is_conv1d else reversed(layer.weight.shape)
        linears.append(Linear(name, inputs, outputs))
    return tuple(linears)


def dataset_lengths(options: TrainingOptions, model: ModelShape) -> Lengths:
    """Row lengths of the run's sources. Alpaca's are built in; others are tokenised with the model's tokenizer.

    Raises DataError or ModelError if the dataset or the tokenizer cannot be loaded, or too many rows are dropped, and
    OptionsError if --max-length is more than the model can hold.
    """
    check_max_length(options, model.positions)
    return joined_lengths([_source_lengths(source, options, model) for source in options.training_dataset])


def _source_lengths(dataset: str, options: TrainingOptions, model: ModelShape) -> Lengths:
    """Row lengths of one of the run's sources."""
    longest = options.max_length or model.positions
    if dataset == DEFAULT_TRAINING_DATASET and not options.dataset_selection:
        return _limited(alpaca_lengths(), longest, options, model.positions)
    import datasets
    import transformers

    from training.data.rows import selection_of
    from training.data.tokens import prepare_dataset
    from training.model.tokenizer import load_tokenizer

    datasets.disable_progress_bars()  # keep the output a plain table
    transformers.utils.logging.disable_progress_bar()
    rows, ledger = prepare_dataset(
        dataset,
        load_tokenizer(model.name, options.trust_remote_code),
        longest,
        options.keep_truncated,
        options.max_dropped_fraction,
        selection=selection_of(dataset, options.training_dataset, options.dataset_selection),
        positions=model.positions,
        drop_unusable=options.drop_unusable,
    )
    return row_lengths(dataset, rows["length"][:], ledger.response_tokens)


def _limited(lengths: Lengths, longest: int, options: TrainingOptions, positions: int) -> Lengths:
    """Drops or cuts rows of more than `longest` tokens, as training does. Raises DataError if too many are dropped."""
    if options.keep_truncated:
        return replace(lengths, tokens=lengths.tokens.clip(max=longest))
    kept = lengths.tokens[lengths.tokens <= longest]
    dropped = 1 - len(kept) / len(lengths.tokens)
    if dropped > options.max_dropped_fraction:
        raised = f"Raise --max-length to at most {positions}, or raise" if longest < positions else "Raise"
        raise DataError(
            f"{lengths.source}: {dropped:.0%} of the rows have more than {longest} tokens and would be dropped, more than "
            f"{options.max_dropped_fraction:.0%}. {raised} --max-dropped-fraction"
        )
    return replace(lengths, tokens=kept)
