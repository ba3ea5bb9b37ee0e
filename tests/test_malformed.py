"""Every JSON file that is read, with values of other types: a sentence names the file and says what is wrong."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from checkpoints import write_release
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import GenerationConfig, TrainerState

import conversion
from conversion import ConversionError, convert
from conversion.conversion import check_settings
from conversion.headers import read_config
from modeling_grin import GrinMoeConfig
from modeling_grin.publishing import card as cards
from modeling_grin.publishing.push import push
from modeling_grin.training import find_problems

OTHERS = [None, True, -1, 2**70, 1.5, float("inf"), "x", [], [1], {"a": {"b": 1}}]
MISSING = object()


def places(value, at=()):
    """Where values are in a JSON document, itself among them."""
    yield at
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(child, (*at, key))


def changed(document, at, other):
    """The document with another value in one place."""
    if not at:
        return other
    document = json.loads(json.dumps(document))
    parent = document
    for key in at[:-1]:
        parent = parent[key]
    if other is MISSING:
        del parent[at[-1]]
    else:
        parent[at[-1]] = other
    return document


def check(path: Path, document, read, more=(), others=OTHERS) -> None:
    """`read` the file with every value replaced: it works, or is a ValueError with the file's name in it.

    Args:
        more: names of fields that the document does not have.
    """
    path.parent.mkdir(exist_ok=True)
    cases = [(at, other) for at in places(document) for other in (*others, *[MISSING] * (at != ()))]
    cases += [((name,), other) for name in more for other in others]
    refused = 0
    for at, other in cases:
        path.write_text(json.dumps(changed(document, at, other)) + "\n")
        try:
            read()
        except Exception as error:
            refused += 1
            if not isinstance(error, ValueError) or path.name not in str(error):
                raise AssertionError(f"{path.name}, {at} = {other}: {type(error).__name__}: {error}") from error
    assert refused, "nothing was refused"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=path.name):
        read()
    path.write_text(json.dumps(document) + "\n")
    read()


@pytest.fixture
def model(tmp_path):
    return write_release(tmp_path / "model", num_hidden_layers=1, num_local_experts=2)[0]


def test_config(model, tmp_path):
    known = {field.name for field in fields(GrinMoeConfig)} | {"text_config", "decoder", "auto_map", "num_experts"}
    known |= {"save_pretrained", "to_dict", "dtype", "id2label"}  # transformers sets what it does not know
    values = json.loads((model / "config.json").read_text())

    def read():
        config = read_config(model)
        config.save_pretrained(tmp_path / "saved")
        assert config.dtype is None or torch.empty(1, dtype=getattr(torch, str(config.dtype).split(".")[-1])).nbytes

    check(model / "config.json", values, read, known - values.keys(), OTHERS[1::3])
    (model / "config.json").write_text(json.dumps({**values, "note": json.loads("[" * 500 + "]" * 500)}))
    with pytest.raises(ConversionError, match=r"config\.json is not a usable config: RecursionError"):
        read()


def test_generation_config(model):
    known = {"max_new_tokens": 3, "eos_token_id": [1], "do_sample": False, "watermarking_config": None}
    check(model / "generation_config.json", known, lambda: check_settings(model),
          more=vars(GenerationConfig()).keys() - known.keys())  # fmt: skip


def test_index(model):
    tensors = {"lm_head.bias": "model.safetensors"}
    document = {"metadata": {"total_size": 3}, "weight_map": tensors}
    index = model / "model.safetensors.index.json"

    def read():
        try:
            conversion.inspect(model)
        except ConversionError as error:
            if "does not list it" not in str(error):  # the document is sound, and lists one tensor of many
                raise

    check(index, document, read)


def test_adapter_config(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2, "lora_alpha": 4, "target_modules": ["w1"],
              "rank_pattern": {"a": 1}, "bias": "none", "lora_dropout": 0.0, "use_dora": False}  # fmt: skip
    check(tmp_path / "adapter_config.json", config, lambda: conversion.inspect(tmp_path))


def test_what_a_card_is_made_of(monkeypatch, model):
    source = {"name": "x", "hub": True, "rows": 3}
    documents = {
        "run.json": {
            "method": "SFT", "base_model": source, "train_data": source, "eval_fraction": 0.5, "global_batch": 8,
            "hyperparameters": {"seed": 1}, "versions": {"torch": "2"}, "hardware": {"device": "x", "processes": 2},
            "parallelism": {"pipeline": 1, "tensor": 2, "fully sharded": False},
        },
        "trainer_state.json": {
            "global_step": 3, "epoch": 1.0,
            "log_history": [
                {"step": 1, "loss": 1.0, "num_tokens": 3}, {"step": 3, "train_runtime": 2.0, "eval_loss": 1.0},
            ],
        },
        "routing/layers.jsonl": {
            "step": 1, "load": [[0.5, 0.5]], **{key: [1.0] for _, key, _, _ in cards.BALANCE_LABELS},
        },
    }  # fmt: skip

    monkeypatch.setattr(cards, "draw_expert_load", lambda load, title: Figure())  # pictures take long
    monkeypatch.setattr(cards, "draw_loss", lambda log, label: Figure())
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: path.touch())
    monkeypatch.setattr(cards, "render", lambda template, **values: "")

    def read():
        cards.write_card(model, force=True)

    (model / "routing").mkdir()
    for name, document in documents.items():
        (model / name).write_text(json.dumps(document) + "\n")
    for name, document in documents.items():
        check(model / name, document, read)


def test_results(tmp_path):
    row = {"row": "a", "tasks": ["a"], "shots": [0], "metric": "acc", "filter": "none", "unit": "%", "score": 1.0,
           "paper": 2.0, "settings": {"limit": 3}}  # fmt: skip
    result = {"task": {"type": "x"}, "dataset": {"type": "x", "name": "y"}, "metrics": [{"type": "acc", "value": 1}]}
    path = tmp_path / "results.json"

    document = {"rows": [row], "model-index": [{"name": "x", "results": [result]}]}
    check(path, document, lambda: cards.read_scores(path, path))


def test_training_checkpoints(tmp_path):
    """Nothing is raised: what is wrong is what `find_problems` returns."""
    folder = tmp_path / "checkpoint-3"
    (folder / "optimizer").mkdir(parents=True)
    state = vars(TrainerState())
    documents = {
        "trainer_state.json": dict.fromkeys(state),
        "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "b"}},
        "optimizer/files.json": ["a"],
    }
    for name, document in documents.items():
        for at in places(document):
            for other in OTHERS:
                (folder / name).write_text(json.dumps(changed(document, at, other)))
                assert find_problems(folder)
        (folder / name).write_text("[" * 100_000)
        assert f"{name} is cut off or damaged" in find_problems(folder)
        shutil.rmtree(folder / name, ignore_errors=True)


def test_settings_are_refused_before_any_work(model, tmp_path):
    """Found when the result was loaded to be checked, after everything had been written."""
    written: list[int] = []
    for text, message in (("1", "got a JSON int"), ('{"max_new_tokens": "x"}', "is not usable: ")):
        (model / "generation_config.json").write_text(text)
        with pytest.raises(ConversionError, match=rf"generation_config\.json .*{message}"):
            convert(model, tmp_path / "result", to="hub", progress=lambda done, total: written.append(done))
        assert not written and [path.name for path in tmp_path.iterdir()] == ["model"]
        assert any("generation_config.json" in problem for problem in push(model, "me/x", dry_run=True).problems)
