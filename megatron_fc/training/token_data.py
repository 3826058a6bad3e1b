"""Megatron's data set of tokens, with what it leaves open: ids are the model's, caches are those of the files."""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_fc.callbacks import Callback
from megatron_fc.errors import UserError
from megatron_fc.training.data_files import indexed_files, refuse_damaged_files
from megatron_fc.training.repetitions import repeats


@dataclass
class TokenDataConfig(GPTDatasetConfig):
    """Megatron's configuration, and:

    Attributes:
        vocabulary: rows of the model's embedding.
        versions: of the index of each prefix, the same on all ranks.
        mask_repetitions: leave samples that repeat themselves out of the loss.
    """

    vocabulary: int = 0
    mask_repetitions: bool = False
    versions: dict[str, str] = field(default_factory=dict)


class ForeignTokenError(Exception):
    """A token that the model has no embedding for.

    One rank meets it; under tensor parallelism Megatron's embedding makes a zero of it, on all ranks.
    """


class TokenDataset(GPTDataset):
    """Samples of one data set."""

    def __init__(
        self, indexed_dataset: Any, dataset_path: str, indices: Any, num_samples: Any, split: Any, config: Any
    ) -> None:
        # Megatron's cache is keyed by this name: data replaced at their path get another one.
        name = f"{dataset_path} {config.versions[dataset_path]}"
        super().__init__(indexed_dataset, name, indices, num_samples, split, config)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = super().__getitem__(index)
        for ids in (sample["tokens"], sample["labels"]):
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocabulary:
                raise ForeignTokenError(
                    f"sample {index} of {self.dataset.path_prefix} has the token {low if low < 0 else high:,}, and the "
                    f"model's vocabulary has {self.config.vocabulary:,}: give the tokenizer that made these data, or "
                    f"make them again"
                )
        if self.config.mask_repetitions and repeats(torch.cat((sample["tokens"], sample["labels"][-1:])).numpy()):
            # A new one: Megatron may hand out the same mask again.
            sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        return sample


class TokenErrors(Callback):
    """Names a foreign token in one sentence; a worker of the loader hands its error on with a traceback before it."""

    def failed(self, error: BaseException) -> BaseException:
        if isinstance(error, ForeignTokenError):
            return UserError(str(error).rsplit(f"{ForeignTokenError.__name__}: ", maxsplit=1)[-1].strip())
        return error


def versions(args: Namespace) -> dict[str, str]:
    """Let the first rank check a run's data, and return the version of each; all ranks call it.

    Raises:
        UserError: data are damaged or not of the model's vocabulary; on all ranks.
    """
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            refuse_damaged_files(args, remember=True)
            found = [{files.prefix: files.version for files in indexed_files(args)}]
        except UserError as error:
            found = [error]
    torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    assert isinstance(found[0], dict)
    return found[0]
