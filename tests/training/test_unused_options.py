"""Options that nothing reads: refused by name, and the list of them is Megatron's own."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import megatron.core
import pytest

from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import is_connection_argument
from megatron_fc.megatron.norm_options import NormOptions
from megatron_fc.training.data_files import OF_A_PREPARED_INDEX
from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.unused_options import NEVER_READ, OTHER_GROUPS, OTHER_LOOPS, refuse_unused_options

MEGATRON = Path(megatron.core.__file__).parents[1]
# Read here, by this project's loop.
READ_HERE = {"mask_repetitions", "check_for_spiky_loss", "data_cache_path", *OF_A_PREPARED_INDEX}
# Read by a loop over the names of a configuration, or kept for scripts of earlier releases, where they change nothing.
READ_BY_LOOP = {"deprecated_use_mcore_models"}
# Of models that generate, embed or classify; they change nothing in a training.
OF_INFERENCE = ("inference_", "bert_", "output_bert_")


# An attribute that is read, directly or by getattr; no assignment.
_READ = re.compile(r"\.(\w+)\b(?!\s*=[^=])|(?:get|has)attr\(\s*\w+,\s*[\"'](\w+)")


def names_read(file: Path) -> Iterator[str]:
    return (name for names in _READ.findall(file.read_text()) for name in names)


@pytest.mark.slow
def test_no_other_option_of_megatrons_is_read_by_nobody() -> None:
    files = [file for file in MEGATRON.rglob("*.py") if file.name != "yaml_arguments.py"]
    # muon_momentum and the like are looked up with the optimizer's prefix, the num_sms in a loop over both names.
    read = {name for file in files for name in names_read(file)}
    dests = {action.dest for action in megatron_arguments()._parser._actions}
    groups = {name for group in OTHER_GROUPS for name in megatron_arguments().group(group)}
    groups |= set(megatron_arguments().group("Logits Distillation"))
    never = {
        name
        for name in dests - read - groups - READ_HERE - READ_BY_LOOP
        if not name.startswith((*OF_INFERENCE, "muon_", "fault_injector_", "inprocess_"))
        and not is_connection_argument(name)
        and name not in {field.name for field in fields(NormOptions)}
        and name not in ("moe_deepep_num_sms", "moe_hybridep_num_sms", "mask_prob", "short_seq_prob")
    }
    assert never - set(OTHER_LOOPS) == set(NEVER_READ) - groups


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--rampup-batch-size", "2", "2", "12"],
            'rampup_batch_size has no effect in Megatron 0.19: set step_batch_size_schedule, e.g. "0:768 250B:1536"',
        ),
        (
            ["--full-validation"],
            "full_validation of one validation set fails in Megatron 0.19 behind the last step: set",
        ),
        (["--use-flash-attn"], "use_flash_attn has no effect in Megatron 0.19: set attention_backend=flash"),
        (["--apply-residual-connection-post-layernorm"], "apply_residual_connection_post_layernorm has no effect in"),
        (["--use-checkpoint-args"], "use_checkpoint_args is not supported by megatron-fc train: write them into"),
        (["--yaml-cfg", "x"], "yaml_cfg is not supported by megatron-fc train: write its settings into the config"),
        (
            ["--inprocess-restart"],
            "inprocess_restart is not supported by megatron-fc train: launch/ starts a run again",
        ),
        (["--img-h", "3"], "img_h is one of Megatron's options for vision, which megatron-fc train does not do"),
        (["--grpo-group-size", "3"], "grpo_group_size is one of Megatron's options for rl, which"),
        (["--sft"], "sft is not supported by megatron-fc train: use Megatron's pretrain_gpt.py with --spec"),
        (["--dataloader-type", "external"], "dataloader_type=external wants a loader of your own script: set single"),
    ],
)
def test_refused_by_name(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_unused_options(megatron_arguments().parse(flags))
    assert str(refused.value).startswith(sentence)


def test_defaults_pass() -> None:
    refuse_unused_options(megatron_arguments().parse([]))


def test_a_group_is_there_by_its_title() -> None:
    assert all(megatron_arguments().group(title) for title in OTHER_GROUPS)
