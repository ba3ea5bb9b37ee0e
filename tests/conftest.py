"""Fixtures that several test modules share."""

import inspect
import json.decoder
import os
import textwrap
import tokenize
from pathlib import Path

import pytest

from modeling_grin.tokenization_grinmoe import GrinMoeTokenizer


@pytest.fixture(scope="session")
def real_tokenizer_dir() -> Path:
    """The folder of a tokenizer with the release's `tokenizer.json`; the tests that ask for it skip without one."""
    default = Path(__file__).parents[2] / "shared" / "reference" / "tokenizer"
    folder = Path(os.environ.get("GRIN_TOKENIZER", default))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in {folder}: point GRIN_TOKENIZER at a copy of the release's")
    return folder


@pytest.fixture(scope="session")
def trained_tokenizer() -> GrinMoeTokenizer:
    """A tokenizer trained on the spot, with a vocabulary of 1024."""
    texts = [inspect.getsource(module) for module in (inspect, json.decoder, textwrap, tokenize)]
    return GrinMoeTokenizer.train_from_iterator(texts, vocab_size=1024)
