from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_fc.data.indexed import write_indexed

DOCUMENTS = [[5, 6, 7], [], [299], list(range(1, 200))]


def test_megatron_reads_back_the_documents_each_with_its_eod(tmp_path: Path) -> None:
    tokens = write_indexed(tmp_path / "data", iter(DOCUMENTS), 300, eod=0)

    dataset = IndexedDataset(str(tmp_path / "data"))
    assert [ids.tolist() for ids in dataset[: len(dataset)]] == [[*ids, 0] for ids in DOCUMENTS]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert tokens == dataset.sequence_lengths.sum() == 203 + 4


@pytest.mark.parametrize(("vocab_size", "dtype"), [(4096, np.uint16), (100_000, np.int32)])
def test_the_smallest_type_that_holds_the_vocabulary_is_used(
    tmp_path: Path, vocab_size: int, dtype: type[np.number]
) -> None:
    write_indexed(tmp_path / "data", [[vocab_size - 1]], vocab_size, eod=0)

    dataset = IndexedDataset(str(tmp_path / "data"))  # named: its arrays are unmapped when it goes
    (ids,) = dataset[:1]
    assert ids.dtype == dtype
    assert ids.tolist() == [vocab_size - 1, 0]
    assert (tmp_path / "data.bin").stat().st_size == 2 * np.dtype(dtype).itemsize


@pytest.mark.parametrize(("document", "eod"), [([1, 300], 0), ([-1], 0), ([1], 300)])
def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path: Path, document: list[int], eod: int) -> None:
    with pytest.raises(ValueError, match=r"document 0 has a token id outside of 0\.\.299"):
        write_indexed(tmp_path / "data", [document], 300, eod=eod)
    assert not (tmp_path / "data.idx").exists()
