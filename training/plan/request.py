"""Plans a run from the trainer's options, which name the model and the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from training.data.held_out import held_out_size
from training.data.rows import check_sources
from training.errors import DataError, ModelError, OptionsError
from training.machine.catalogue import Machine, find_family
from training.options.deepspeed_checks import file_problems, precision_problems
from training.options.settings import Settings, resolve
from training.options.trainer_options import TrainingOptions
from training.plan.fit import Plan, fastest, plan_files, plan_run, with_packing
from training.plan.lookup import dataset_lengths, is_built_in, model_shape
from training.plan.model_shape import ModelShape
from training.plan.presets import METHODS, method_options


def plan_options(
    options: TrainingOptions, ranks: int, machine: Machine, recorded_test_size: int | None = None
) -> Plan:
    """Plans a run from the trainer's options: looks up the model and the dataset by name.

    `recorded_test_size` is the number of held-out rows of the run that is resumed.

    Raises MachineError for an unknown GPU family, OptionsError for options that cannot be used on the machine, and
    ModelError or DataError if the model or the dataset cannot be used.
    """
    check_sources(options.training_dataset, options.dataset_selection)  # before the model is looked up
    family, model = find_family(machine.family), model_of(options)
    settings = checked_settings(options, ranks, family.precision)
    lengths = dataset_lengths(options, model)
    held_out = held_out_size(options.test_size, len(lengths.tokens), recorded_test_size)
    if recorded_test_size is not None:
        settings = settings.with_test_size(held_out)
    if family.precision == "fp16" and settings.precision == "bf16":
        possible = plan_files(settings, lengths, model, machine, "fp16")
        raise OptionsError(
            f"a {machine.gpu} cannot compute in bf16. Type --deepspeed {fastest(possible) or family.offload}"
        )
    plan = plan_run(settings, lengths, model, machine)
    return replace(plan, files=plan_files(settings, lengths, model, machine, settings.precision))


def first_method(options: Mapping[str, Any], family: str, machine: Machine) -> str:
    """The first of METHODS with which a run with these options fits on one GPU; "full" if none does.

    Its plan tells the reasons, as it does for options that cannot be used.
    """
    for method in METHODS:
        chosen = TrainingOptions(**{**method_options(family, 1, method), **options})
        try:
            if plan_options(chosen, 1, machine).fits:
                return method
        except (DataError, ModelError, OptionsError):
            break
    return "full"


def checked_settings(options: TrainingOptions, ranks: int, best_precision: str) -> Settings:
    """`resolve`. Raises OptionsError with every problem for which a run of `ranks` ranks refuses the DeepSpeed file."""
    if options.quantize and ranks > 1:
        raise OptionsError(
            f"--quantize {options.quantize}: one device trains on weights in 4 bits, and this run has {ranks}. "
            "Type --num-gpus 1, or leave out --quantize"
        )
    settings = resolve(options, ranks, best_precision)
    if settings.deepspeed is not None:
        problems = file_problems(options, settings.deepspeed, ranks)
        if problems := problems + precision_problems(options, settings.deepspeed):
            raise OptionsError(*problems)
    return settings


def model_of(options: TrainingOptions) -> ModelShape:
    """The shape of the run's base model, with what its architecture allows.

    Raises ModelError for an unknown model, OptionsError for an adapter on an adapter.
    """
    model = model_shape(options.input_model, options.trust_remote_code)
    if is_built_in(model.name):
        return model
    import transformers

    from training.model.adapter import check_base
    from training.model.loading import load_config
    from training.model.packing import Packing, packing_of
    from training.model.trial import try_model

    transformers.utils.logging.disable_progress_bar()  # the small copy is saved and loaded
    transformers.logging.set_verbosity_error()
    name, trust_remote_code = options.input_model, options.trust_remote_code
    config = load_config(name, trust_remote_code)
    if options.lora:
        check_base(name)
    packing = Packing("padded rows were requested")
    if options.batching == "packed":
        packing = packing_of(config, trust_remote_code)
    # grows: without the tokenizer it is not known whether the embedding does.
    packing = try_model(name, config, packing, grows=False, trust_remote_code=trust_remote_code)
    return with_packing(model, packing)
