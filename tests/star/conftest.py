"""What tests of trainings have in common."""

from __future__ import annotations

import pytest
import torch
from stand_in import write_texts

from star.data import Corpus, open_corpus


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small text, opened once a module."""
    folder = tmp_path_factory.mktemp("corpus")
    return open_corpus(write_texts(folder / "texts"), cache_directory=folder)
