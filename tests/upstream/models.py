"""Tiny models of GRIN-MoE and of the stock architectures beside it, with one vocabulary."""

import atexit
import functools
import inspect
import json.decoder
import re
import shutil
import tempfile
import textwrap
from pathlib import Path

import huggingface_hub.constants
import pytest
import sources
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TokenizersBackend,
)

from modeling_grin import GrinMoeTokenizer

KINDS = {"grinmoe": "GrinMoe", "phimoe": "Phimoe", "mixtral": "Mixtral"}
OURS = "grinmoe"

# Names of tiny models in `hub_cache`.
CAUSAL_LM, CLASSIFIER, FEATURES = "tiny/causal-lm", "tiny/sequence-classifier", "tiny/features"
COMMIT = "0" * 40

FOLDER = Path(tempfile.mkdtemp(prefix="upstream-models-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "sliding_window": 64,
}


def for_each_kind(*bases: type) -> dict[str, type]:
    """A subclass of `bases` for each architecture, by name; its `kind` says which."""
    names = {kind: f"{bases[0].__name__}{name}" for kind, name in KINDS.items()}
    return {name: type(name, bases, {"kind": kind}) for kind, name in names.items()}


@functools.cache
def tokenizer(kind: str):
    """The project's own for ours; for the others the same vocabulary in transformers' plain class."""
    texts = [inspect.getsource(module) for module in (inspect, json.decoder, textwrap)]
    ours = GrinMoeTokenizer.train_from_iterator(texts, vocab_size=1000)
    if kind == OURS:
        return ours
    return TokenizersBackend(
        tokenizer_object=ours.backend_tokenizer,
        chat_template=ours.chat_template,
        padding_side="left",
        model_max_length=SIZES["max_position_embeddings"],
        **ours.special_tokens_map,
    )


@functools.cache
def checkpoint(kind: str, head=AutoModelForCausalLM, **settings) -> Path:
    """The folder of a tiny model with its tokenizer."""
    folder = FOLDER / kind / "-".join([head.__name__, *map(str, settings.values())])
    vocabulary = tokenizer(kind)
    special = {f"{token}_token_id": getattr(vocabulary, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(vocabulary), **SIZES, **special, **settings)
    head.from_config(config).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


# Not those with images or remote code.
HUB_NAME = re.compile(r'"(\w+-internal-testing/tiny-(?![^"]*(?:Remote|Conditional))[^"]+)"')


@functools.cache
def hub_cache(kind: str) -> Path:
    """A cache of the Hub in which each text model that peft's and trl's tests name is the tiny model of `kind`."""
    cache = FOLDER / kind / "hub"
    names = {CAUSAL_LM: checkpoint(kind), FEATURES: checkpoint(kind, AutoModel)}
    names[CLASSIFIER] = checkpoint(kind, AutoModelForSequenceClassification)
    reward_model = checkpoint(kind, AutoModelForSequenceClassification, num_labels=1)
    for file in sources.CACHE.glob("*/*_tests/test_*.py"):
        for name in HUB_NAME.findall(file.read_text()):
            names[name] = reward_model if "SequenceClassification" in name else names[CAUSAL_LM]
    for name, source in names.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / COMMIT).symlink_to(source)
    return cache


@pytest.fixture(autouse=True)
def hub(request, monkeypatch):
    """What the Hub has for the test's architecture, for modules that import this fixture."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache(request.cls.kind)))
