"""Fixtures that several test modules share."""

import gc
import inspect
import json.decoder
import os
import textwrap
import tokenize
from pathlib import Path

import pytest
from checkpoints import released_config, released_tensors, write_checkpoint
from near_ties import MARGIN, watch_choices
from transformers import logging

from modeling_grin.tokenization_grinmoe import GrinMoeTokenizer


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Garbage is looked for in what tests make, and not in all that was imported (see `frozen.py`)."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def tiny_release(trained_tokenizer, tmp_path_factory) -> Path:
    """The folder of a tiny model in the release's layout, two shards and a tokenizer. Not to be written to."""
    special = {f"{kind}_token_id": getattr(trained_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = released_config(vocab_size=len(trained_tokenizer), **special)
    folder = write_checkpoint(tmp_path_factory.mktemp("release"), config, released_tensors(config), num_shards=2)
    trained_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def transformers_warns():
    """As it does by default, whatever an earlier test in the process has set: commands and examples quieten it."""
    logging.set_verbosity_warning()


@pytest.fixture
def far_from_ties():
    """The test compares computations whose experts no rounding can change; else another seed is needed."""
    with watch_choices() as smallest:
        yield
    assert smallest() > MARGIN, f"a router's choice hangs on {smallest():.1e} of a logit: use another seed"
