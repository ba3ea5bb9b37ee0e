"""A pipeline trains as one process does: same updates, losses and gradient norms, with sampling and balance loss on.

One process, and DDP, are proven elsewhere against loops in float64 (`test_layouts.py`).
"""

import pytest
import runs
import sharded_runs
import torch
from cases import run_cases, update_difference

from modeling_grin.training.sharded import weights_of

# Of an update, where sums have another order; what the cases turn on changes updates by more than 0.01 (tested below).
TOLERANCE = 1e-4
# A clipped update is 0.2 long: one parameter of 1 that float32 rounds the other way, 1.2e-7, is 6e-5 of its hundredth,
# which `difference` compares with. Measured: 1.1e-5 with AVX512, 2.1e-5 with AVX2.
CLIPPED_TOLERANCE = 3e-4
NOISE = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "router_bias_update_rate": 0.05}
INTERLEAVED = {"pp_size": 2, "schedule": "Interleaved1F1B"}
TENSOR = {"pp_size": 2, "tp_size": 2}

PARTS = {"micro_batch": 1, "max_steps": 2}  # of two data-parallel ranks

# AdamW in 3 steps with clipping, saved after one; for checkpoints, which other weights then resume from.
ADAMW = {**sharded_runs.TRAINING, "micro_batch": 2}
SAVED = {**ADAMW, **sharded_runs.SAVING}
RESUMED = {**ADAMW, "checkpoint": "other"}
# With dropout, rows shuffled, saved in the middle of an epoch.
EXACT = {**SAVED, "accumulation": 2, "max_steps": 4, "save_steps": 3, "train_sampling_strategy": "random",
         "expert_dropout": 0.1}  # fmt: skip

# processes -> name -> case; references come first, and have no layout.
CASES = {
    1: {
        "one": {"layout": None},
        "one-5": {"layout": None, "checkpoint": "layers-5"},
        "one-clipped": {"layout": None, "max_grad_norm": 1.0, "max_steps": 1},
        "one-bf16": {"layout": None, "bf16": True},
        "one-uneven": {"layout": None, "micro_batch": 3, "max_steps": 4},
        "one-sft": {"layout": None, "run": "sft"},
        "one-saved": {"layout": None, **SAVED},
    },
    2: {
        "ddp": {"layout": None, **PARTS},
        "1F1B": {"layout": {"pp_size": 2}},
        "interleaved": {"layout": INTERLEAVED},
        "bf16": {"layout": {"pp_size": 2}, "bf16": True},
        "uneven": {"layout": {"pp_size": 2}, "micro_batch": 3, "max_steps": 4},
        "sft": {"layout": {"pp_size": 2}, "run": "sft"},
        "saved": {"layout": {"pp_size": 2}, **SAVED},
        "exact": {"layout": {"pp_size": 2}, **EXACT},
        "exact-resumed": {
            "layout": {"pp_size": 2}, **EXACT, "checkpoint": "other", "resume_from": "exact-run/checkpoint-3"
        },
        "errors": {"run": "errors"},
    },
    4: {
        "four stages": {"layout": {"pp_size": 4}, "checkpoint": "layers-5"},
        "tensor": {"layout": TENSOR},
        "tensor-clipped": {"layout": TENSOR, "max_grad_norm": 1.0, "max_steps": 1},
        "data": {"layout": {"pp_size": 2}, **PARTS},
        "data-interleaved": {"layout": INTERLEAVED, "activation_checkpointing": True, **PARTS},
        "tensor-from-one": {"layout": TENSOR, **RESUMED, "resume_from": "one-saved-run/checkpoint-1"},
    },
}  # fmt: skip
# In one process, after the others.
FROM_PIPELINE = {"one-from-pipeline": {"layout": None, **RESUMED, "resume_from": "saved-run/checkpoint-1"}}
# Its reference, and by how much an update may differ: bit for bit is 0.
SAME = {
    "1F1B": ("one", 0),
    "interleaved": ("one", 0),
    "bf16": ("one-bf16", 0),
    "uneven": ("one-uneven", 0),
    "sft": ("one-sft", TOLERANCE),  # trl computes its loss in another way
    "four stages": ("one-5", 0),
    "tensor": ("one", TOLERANCE),
    "tensor-clipped": ("one-clipped", CLIPPED_TOLERANCE),
    "data": ("ddp", 0),
    "data-interleaved": ("ddp", 0),
    "saved": ("one-saved", TOLERANCE),
    "tensor-from-one": ("one-saved", TOLERANCE),
    "one-from-pipeline": ("one-saved", TOLERANCE),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> results of every rank, all cases of one number of processes in one launch."""
    folder = tmp_path_factory.mktemp("pipeline")
    for layers in (4, 5):
        runs.make_model(num_hidden_layers=layers, **NOISE).save_pretrained(folder / f"layers-{layers}")
    runs.make_model(seed=4, num_hidden_layers=4, **NOISE).save_pretrained(folder / "other")
    results = {}
    for processes, cases in (*CASES.items(), (1, FROM_PIPELINE)):
        results |= run_cases("pipeline_runs", folder, processes, cases, run="train", checkpoint="layers-4")
    return results


def whole(ranks):
    """The parameters of all ranks; those that several ranks have are the same bit for bit."""
    parameters = {}
    for rank in ranks:
        for name, parameter in rank["parameters"].items():
            assert torch.equal(parameters.setdefault(name, parameter), parameter), name
    return parameters


def start(num_layers):
    return weights_of(runs.make_model(num_hidden_layers=num_layers, **NOISE))


def difference(actual, expected):
    return update_difference(actual, expected, start(5 if any(".layers.4." in name for name in expected) else 4))


def logged(result):
    """Losses, gradient norms and evaluation losses, in order."""
    keys = ("loss", "grad_norm", "eval_loss")
    return [entry[key] for entry in result["logs"] for key in keys if key in entry]


@pytest.mark.parametrize("name", SAME)
def test_as_one_process(trained, name):
    """Updates of all parameters; on every rank losses, norms of the whole gradient, and losses in evaluation."""
    reference, tolerance = SAME[name]
    expected = trained[reference]
    assert difference(whole(trained[name]), whole(expected)) <= tolerance
    assert len(logged(expected[0])) >= 2
    for rank in trained[name]:
        assert logged(rank) == pytest.approx(logged(expected[0]), rel=1e-6)


def test_the_same_pipeline_resumes_bit_for_bit(trained):
    for resumed, exact in zip(trained["exact-resumed"], trained["exact"], strict=True):
        assert logged(resumed) == logged(exact)
        assert resumed["parameters"].keys() == exact["parameters"].keys()
        assert all(torch.equal(resumed["parameters"][name], exact["parameters"][name]) for name in exact["parameters"])
        assert resumed["forwards"] == exact["forwards"] / 4  # of the last step alone


def test_activations_are_recomputed(trained):
    for rank, other in zip(trained["data-interleaved"], trained["data"], strict=True):
        assert rank["forwards"] == 2 * other["forwards"] > 0


def test_what_the_cases_turn_on_matters(trained):
    """Else the comparisons above would show less than they seem to."""
    one = whole(trained["one"])
    for name in ("one-bf16", "one-clipped", "one-uneven", "one-sft"):
        assert difference(whole(trained[name]), one) > 0.01, name


@pytest.mark.parametrize(("name", "num_stages"), [("four stages", 4), ("1F1B", 2), ("tensor", 2)])
def test_each_rank_has_its_layers_only(trained, name, num_stages):
    num_layers = 5 if name == "four stages" else 4
    sizes = {4: [2, 1, 1, 1], 2: [2, 2]}[num_stages]  # of the stages, in order
    ranks = trained[name]
    for rank, result in enumerate(ranks):
        stage = rank * num_stages // len(ranks)
        layers = {int(key.split(".")[2]) for key in result["parameters"] if ".layers." in key}
        assert layers == set(range(sum(sizes[:stage]), sum(sizes[: stage + 1])))
        assert ("model.embed_tokens.weight" in result["parameters"]) == (stage == 0)
        assert ("lm_head.weight" in result["parameters"]) == (max(layers) == num_layers - 1)
        # Logits are whole nowhere; evaluation has two batches.
        assert result["chunked"] == (result["forwards"] + 2) * (max(layers) == num_layers - 1)


MESSAGES = {
    "schedule": "schedule must be one of GPipe, 1F1B, Interleaved1F1B; got '1f1b'",
    "folder": "nowhere is not a folder here: download the checkpoint",
    "processes": "must be a multiple of pp_size=3 x tp_size=1, with at least two stages; got 2",
    "layers": "num_hidden_layers=3 layers do not make 4 pipeline stages",
    "tied": "tie_word_embeddings=True: the first stage and the last cannot share a parameter",
    "exact_balance": "a pipeline cannot do exact_balance=True",
    "accumulation": "must be 2 or a multiple for 1F1B on 2 stages; got 1",
    "interleaved accumulation": "must be 2 or a multiple for Interleaved1F1B on 2 stages; got 5",
    "smoothing": "a pipeline cannot do label_smoothing_factor",
    "dpo": "a pipeline cannot do DPO",
    "callback": "RoutingCallback needs every layer in one process",
    "forward": "this rank has a part of the model only",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_be_done_is_said(trained, name):
    for messages in trained["errors"]:
        assert MESSAGES[name] in messages[name]
