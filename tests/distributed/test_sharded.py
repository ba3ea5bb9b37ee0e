"""FSDP2, tensor parallelism and both: the same training as in one process, and checkpoints for any layout."""

import json
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import runs
import sharded_runs
import torch
from cases import difference, log_difference, moved, run_cases
from checkpoints import released_config, released_tensors, write_checkpoint
from processes import get_context
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import sharded_loading
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.loading_grinmoe import check_parallel_sizes
from modeling_grin.training import sharded
from modeling_grin.training.checkpoints import find_problems, last_complete_checkpoint

TOLERANCE = 1e-5
FSDP2, TP = {"fsdp_size": 2}, {"tp_size": 2}
FSDP2_TP = {**FSDP2, **TP}
HSDP = {**FSDP2, "dp_replicate_size": 2}
NOISE = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1}
BIASED = {"router_bias_update_rate": 0.05}  # selection biases, which every step moves
NO_NOISE = dict.fromkeys(NOISE, 0.0)

ACCUMULATION = sharded_runs.TRAINING["accumulation"]
SAVED = f"checkpoint-{sharded_runs.SAVED_AT}"

# Dropout, rows shuffled, saved in the middle of an epoch.
EXACT = {"accumulation": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3,
         "config": {"expert_dropout": 0.1}, "train_sampling_strategy": "random"}  # fmt: skip
# Every expert takes every token: no pick can be another one because of bfloat16's rounding. grouped_mm takes rows of
# multiples of 16 bytes, on each rank.
BF16 = {"bf16": True, "checkpoint": "wide", "config": {"router_estimator": "gshard", "num_experts_per_tok": 6}}
DENSE = {"max_steps": 2, "config": {"router_estimator": "dense"}}  # each slot by itself, as in v2_star and v2_paper
PLAIN = {"run": "train_plain", "optim": "sgd", "learning_rate": 0.1, "config": NO_NOISE, "max_steps": 1,
         "accumulation": 2}  # fmt: skip
ROUTES = torch.rand(2, runs.LENGTH, 2, 6, generator=torch.Generator().manual_seed(0)).argsort(dim=-1)[..., :2]
REPLAY = {"run": "replay", "routes": ROUTES.tolist(),
          "config": {"router_sampling": False, "input_jitter_noise": 0.0, "router_aux_loss_coef": 0.0}}  # fmt: skip
# The largest loss, which is the first step's: the best model is not the last one.
BEST = {"run": "train_best", "greater_is_better": True}


def cases(num_ranks, second=False):
    """name -> arguments, in the order of the runs; `second`: of one process, after those of several."""
    saving = sharded_runs.SAVING
    if num_ranks == 1 and second:
        yield "one-from-fsdp2", {"layout": None, "resume_from": f"fsdp2-run/{SAVED}", "checkpoint": "other"}
    elif num_ranks == 1:
        yield "one", {"layout": None, **saving}
        yield "one-stock", {"layout": None, **saving, "distributed_checkpoint": False, "max_steps": 1}
        yield "one-sgd", {"layout": None, **saving, "optim": "sgd", "max_steps": 1}
        yield "one-bf16", {"layout": None, **BF16}
        yield "one-dense", {"layout": None, **DENSE}
        yield "one-infer", {"layout": None, "run": "infer"}
        yield "one-plain", {"layout": None, **PLAIN}
        yield "one-replay", {"layout": None, **REPLAY}
    elif num_ranks == 2:
        yield "ddp", {"layout": None, **saving}
        yield "fsdp2", {"layout": FSDP2, **saving, "saved": True}
        yield "tp", {"layout": TP, **saving}
        yield "tp-noise_of_rank", {"layout": TP, "noise_of_rank": True, "max_steps": 1}
        yield "fsdp2-recomputed", {"layout": FSDP2, "activation_checkpointing": True}
        yield "fsdp2-offloaded", {"layout": {**FSDP2, "fsdp_cpu_offload": True}}
        yield "tp-dense", {"layout": TP, **DENSE}
        yield "tp-infer", {"layout": None, "run": "infer", "tp_plan": "auto"}
        yield "tp-plain", {"layout": TP, **PLAIN}
        for before, after in (("fsdp2", TP), ("tp", FSDP2)):
            resumed = {"resume_from": f"{before}-run/{SAVED}", "checkpoint": "other"}
            yield f"{'tp' if after is TP else 'fsdp2'}-from-{before}", {"layout": after, **resumed}
        yield "fsdp2-best", {"layout": FSDP2, **BEST}
        bfloat16 = {"config": {"dtype": "bfloat16"}, "max_steps": 1}
        yield "fsdp2-bfloat16", {"layout": FSDP2, "saved": True, **bfloat16}
        attempts = {
            "no_optimizer": {"resume_from": f"one-stock-run/{SAVED}"},
            "other_optimizer": {"resume_from": f"one-sgd-run/{SAVED}"},
            "other_shape": {"resume_from": f"one-run/{SAVED}", "checkpoint": "narrow"},
        }
        attempts = {name: {"checkpoint": "source", "layout": FSDP2, **case} for name, case in attempts.items()}
        yield "fsdp2-refused", {"run": "refusals", "attempts": attempts}
        yield "tp-replay", {"layout": TP, **REPLAY}
        yield "fsdp2-replay", {"layout": FSDP2, **REPLAY}
    else:
        yield "fsdp2_tp", {"layout": FSDP2_TP, **saving}
        yield "hsdp", {"layout": HSDP}
        yield "fsdp2_tp-bf16", {"layout": FSDP2_TP, **BF16}
        yield "fsdp2_tp-from-one", {"layout": FSDP2_TP, "resume_from": f"one-run/{SAVED}", "checkpoint": "other"}
        yield "fsdp2_tp-whole", {"layout": FSDP2_TP, **EXACT}
        resumed = {"resume_from": "fsdp2_tp-whole-run/checkpoint-3", "checkpoint": "other"}
        yield "fsdp2_tp-resumed", {"layout": FSDP2_TP, **EXACT, **resumed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where everything ran. Runs begin with `source`, `other` (weights), `narrow` or `wide` (sizes)."""
    folder = tmp_path_factory.mktemp("sharded")
    settings = {"torch_dtype": "float32", "router_aux_loss_coef": runs.COEFFICIENT, **NOISE, **BIASED}
    for name, seed, intermediate_size in (("source", 3, 24), ("other", 4, 24), ("narrow", 3, 16), ("wide", 3, 32)):
        config = released_config(**settings, intermediate_size=intermediate_size)
        write_checkpoint(folder / name, config, released_tensors(config, seed), num_shards=2)
    # Left there by an earlier save that was killed: readers take a single file before others, and torch all shards.
    other = sharded.weights_of(runs.make_model(4))
    for left, name in (("", "model"), (sharded.SHARDS_FOLDER, "shard-00009-model-00001-of-00001")):
        (folder / "fsdp2-saved" / left).mkdir(exist_ok=True, parents=True)
        offsets = {tensor: {"saved_offsets": [0] * other[tensor].dim()} for tensor in other}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file(other, folder / "fsdp2-saved" / left / f"{name}.safetensors", metadata=metadata)
    for num_ranks, second in ((1, False), (2, False), (4, False), (1, True)):
        defaults = {"run": "train", "checkpoint": "source"}
        run_cases("sharded_runs", folder, num_ranks, dict(cases(num_ranks, second)), **defaults)
    return folder


@pytest.fixture
def result(folder):
    """name and rank -> what the case returned there."""
    return lambda name, rank=0: torch.load(folder / f"{name}-{rank}.pt")


def assert_trained_alike(actual, expected):
    """The first step's gradients, the updates of all weights, losses and norms of all steps."""
    assert difference(actual["gradients"], expected["gradients"]) < TOLERANCE
    assert_same_end(actual, expected)


def assert_same_end(actual, expected):
    start = dict(runs.make_model().named_parameters())
    updates = (moved(result["parameters"], start) for result in (actual, expected))
    assert difference(*updates) < TOLERANCE
    assert log_difference(actual["logs"], expected["logs"]) < TOLERANCE


# ---- Training ----


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp", "fsdp2_tp", "hsdp", "fsdp2-offloaded"])
def test_a_layout_trains_as_one_process(result, layout):
    actual, expected = result(layout), result("one")
    assert_trained_alike(actual, expected)
    assert expected["logs"][0]["grad_norm"] > sharded_runs.TRAINING["max_grad_norm"]  # it clips
    assert actual["chunked"] == actual["forwards"] == expected["chunked"]  # logits are never whole


@pytest.mark.parametrize("layout", ["fsdp2", "tp"])
def test_ranks_log_the_same(result, layout):
    first, second = result(layout, 0), result(layout, 1)
    assert log_difference(second["logs"], first["logs"]) == 0
    assert difference(second["parameters"], first["parameters"]) == 0


def test_tensor_parallel_ranks_with_noise_of_their_own_are_found(result):
    """What the comparisons above would see, were noise not the same on all ranks."""
    actual, expected = result("tp-noise_of_rank"), result("one")
    assert difference(actual["gradients"], expected["gradients"]) > 1000 * TOLERANCE


def test_estimators_that_mix_slots_under_tensor_parallelism(result):
    assert_trained_alike(result("tp-dense"), result("one-dense"))


def test_recomputed_activations_change_no_bit(result):
    actual, expected = result("fsdp2-recomputed"), result("fsdp2")
    assert log_difference(actual["logs"], expected["logs"]) == 0
    assert difference(actual["gradients"], expected["gradients"]) == 0
    assert difference(actual["parameters"], expected["parameters"]) == 0
    assert actual["forwards"] == 2 * expected["forwards"] == 2 * sharded_runs.STEPS * ACCUMULATION  # they are


@pytest.mark.parametrize(("layout", "num_ranks"), [("fsdp2", 2), ("fsdp2_tp", 4), ("hsdp", 4)])
def test_fsdp2_holds_no_whole_gradients_between_micro_batches(result, layout, num_ranks):
    """Each micro-batch reduces those of each group; the copies of HSDP's groups meet once a step."""
    num_steps = sharded_runs.STEPS
    for rank in range(num_ranks):
        counts = result(layout, rank)
        groups = counts["groups"] - 1  # that of the whole model has nothing left
        assert groups > 2 and counts["held"] == 0
        assert counts["reduce_scatters"] == num_steps * ACCUMULATION * groups
        assert counts["all_reduces"] == (num_steps * groups if layout == "hsdp" else 0)


def test_bfloat16_autocast_is_close_to_that_of_one_process(result):
    """Measured: gradients 0.017, logs 4e-4."""
    actual, expected = result("fsdp2_tp-bf16"), result("one-bf16")
    assert difference(actual["gradients"], expected["gradients"]) < 0.05
    assert log_difference(actual["logs"], expected["logs"]) < 2e-3


def test_the_balance_loss_under_a_trainer_that_announces_no_steps(result):
    """Each forward pass counts tensor-parallel ranks once."""
    actual, expected = result("tp-plain"), result("one-plain")
    assert difference(actual["gradients"], expected["gradients"]) < TOLERANCE


@pytest.mark.parametrize(("layout", "rank"), [("tp", 0), ("tp", 1), ("fsdp2", 0), ("fsdp2", 1)])
def test_every_layout_replays_the_same_routes(result, layout, rank):
    actual, expected = result(f"{layout}-replay", rank), result("one-replay")
    assert torch.equal(expected["experts"].unflatten(0, (2, -1)), ROUTES)
    assert torch.equal(actual["experts"], expected["experts"])
    assert difference(actual["gradients"], expected["gradients"]) <= TOLERANCE


# ---- Loading for inference ----


def test_tp_plan_auto_computes_what_one_process_does(result):
    expected = result("one-infer")
    for rank in (0, 1):
        actual = result("tp-infer", rank)
        assert difference({"": actual["logits"]}, {"": expected["logits"]}) < TOLERANCE
        assert torch.equal(actual["generated"], expected["generated"])
        assert difference({"": actual["hidden"]}, {"": expected["hidden"]}) < TOLERANCE
        assert actual["classified"] == expected["classified"] == (2, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_has_a_slice_of_every_expert_and_all_routers(result, rank):
    placements = result("tp-infer", rank)["placements"]
    layer = "model.layers.1"
    assert placements[f"{layer}.block_sparse_moe.experts.gate_up_proj"][1] == (6, 24, 32)  # of 2 x 24 rows
    assert placements[f"{layer}.block_sparse_moe.experts.down_proj"][1] == (6, 32, 12)  # of 24 columns
    assert placements[f"{layer}.block_sparse_moe.gate.weight"] == ("whole", (6, 32))
    assert placements[f"{layer}.self_attn.q_proj.weight"][1] == (16, 32)
    assert placements[f"{layer}.self_attn.o_proj.weight"][1] == (32, 16)
    assert placements["lm_head.weight"][1] == (66 - rank, 32)  # of 131 rows
    assert placements["model.embed_tokens.weight"][1] == (66 - rank, 32)


LINEAR = {"_experts_implementation": "linear"}


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        ({}, {"tp_size": 3}, "num_attention_heads=4 is not divisible by tp_size=3"),
        ({}, {"tp_size": 4}, "num_key_value_heads=2 is not divisible by tp_size=4"),
        ({"intermediate_size": 25}, TP, "intermediate_size=25 is not divisible by tp_size=2"),
        # Experts are dealt out whole, in equal numbers: 6 to 4 ranks are 2, 2, 2 and none.
        ({"num_local_experts": 6}, {"fsdp_size": 4}, "num_local_experts=6 gives.*3 of fsdp_size=4"),
        ({"num_local_experts": 6}, {"fsdp_size": 3}, None),
        ({"num_local_experts": 16}, {"fsdp_size": 12}, "num_local_experts=16 gives.*8 of fsdp_size=12"),
        ({"num_local_experts": 16}, {"fsdp_size": 8}, None),
        (LINEAR, TP, "load without quantization_config and experts_implementation"),
    ],
)
def test_sizes_that_a_layout_cannot_have(sizes, layout, message):
    config = GrinMoeConfig(**released_config(**{name: sizes[name] for name in sizes if name not in LINEAR}))
    config._experts_implementation = sizes.get("_experts_implementation")
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_parallel_sizes(config, **layout)


# ---- Checkpoints ----


def test_the_same_layout_resumes_bit_for_bit(result):
    for rank in range(4):
        whole, resumed = result("fsdp2_tp-whole", rank), result("fsdp2_tp-resumed", rank)
        assert [entry["loss"] for entry in resumed["logs"]] == [entry["loss"] for entry in whole["logs"]]
        assert difference(resumed["parameters"], whole["parameters"]) == 0


@pytest.mark.parametrize("name", ["one-from-fsdp2", "fsdp2_tp-from-one", "tp-from-fsdp2", "fsdp2-from-tp"])
def test_another_layout_resumes_to_the_same_end(result, name):
    assert_same_end(result(name), result("one"))


def test_the_best_model_is_loaded_at_the_end(result):
    best = result("fsdp2-best")
    assert best["evaluations"][0] == max(best["evaluations"]) > best["evaluations"][-1]
    assert best["evaluation"] == best["evaluations"][0]


@pytest.mark.parametrize(("name", "dtype"), [("fsdp2", "float32"), ("fsdp2-bfloat16", "bfloat16")])
def test_save_model_writes_a_release(folder, result, name, dtype):
    saved = folder / f"{name}-saved"
    config = json.loads((saved / "config.json").read_text())
    assert config["dtype"] == dtype and config["architectures"] == ["GrinMoeForCausalLM"]
    assert "distributed_config" not in config
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert sorted(index["weight_map"]) == sorted(released_tensors(released_config(**BIASED)))
    others = {path.name for path in saved.iterdir()} - set(files)
    assert others == {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
                      "training_args.bin"}  # fmt: skip
    for file in files:
        with safe_open(saved / file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}  # which older readers ask for
            for tensor in tensors.keys():  # noqa: SIM118
                kept = dtype if "e_score_correction_bias" not in tensor else "float32"
                assert tensors.get_slice(tensor).get_dtype() == {"float32": "F32", "bfloat16": "BF16"}[kept]

    model = GrinMoeForCausalLM.from_pretrained(saved)
    assert model.dtype == getattr(torch, dtype)
    expected = result(name)["parameters"]
    for tensor, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[tensor]), tensor


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the run's folder with one checkpoint of two FSDP2 ranks."""
    shutil.copytree(folder / "fsdp2-run" / SAVED, tmp_path / "run" / SAVED)
    return tmp_path / "run" / SAVED


def test_checkpoints_hold_no_pickles_but_trainers_own(copied):
    assert find_problems(copied) == []
    left = {path.name for path in copied.rglob("*") if path.is_file() and path.suffix not in (".json", ".safetensors")}
    assert left == {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "training_args.bin"}


@pytest.mark.parametrize("rank", [1, 2])
def test_a_missing_or_damaged_part_of_the_optimizer_is_found(copied, rank):
    part = copied / "optimizer" / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    assert find_problems(copied) == [f"{part.relative_to(copied)} is cut off or damaged"]
    part.unlink()
    assert find_problems(copied) == [f"{part.relative_to(copied)} is missing"]
    assert last_complete_checkpoint(copied.parent)[0] is None
    model = runs.make_model()
    with pytest.raises(ValueError, match=r"optimizer( lacks|: state\.)"):
        sharded.load_optimizer(model, torch.optim.AdamW(model.parameters()), copied / "optimizer")

    (copied / "optimizer" / "files.json").write_text('["shard')
    assert find_problems(copied) == ["optimizer/files.json is cut off or damaged"]
    shutil.rmtree(copied / "optimizer")
    assert find_problems(copied) == ["optimizer.pt is missing"]


@pytest.mark.parametrize("bad", ["lacks", "shape"])
def test_weights_that_do_not_fit_are_refused(copied, bad):
    model = runs.make_model(**({"vocab_size": 130} if bad == "shape" else {"num_hidden_layers": 3}))
    message = r"must have shape \[130, 32\]; got \[131, 32\]" if bad == "shape" else r"lacks model\.layers\.2\."
    with pytest.raises(ValueError, match=message):
        sharded.load_weights(model, copied)


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoints_that_sharded_runs_cannot_resume_are_refused(result, rank):
    messages = result("fsdp2-refused", rank)
    assert "has no optimizer" in messages["no_optimizer"] and "distributed_checkpoint=True" in messages["no_optimizer"]
    assert "lacks state." in messages["other_optimizer"]
    # Each rank checks the experts that it holds.
    assert re.search(r"experts\.\d\.w1\.weight must have shape", messages["other_shape"])


def test_ranks_hold_and_read_their_part(monkeypatch):
    """Relative to the checkpoint's bytes; the benchmark has larger models, and ranks that import all themselves."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 16}  # fmt: skip
    context = get_context()
    monkeypatch.setattr(sharded_loading, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
    monkeypatch.setattr(sharded_loading, "in_fresh_process", lambda function, *arguments: function(*arguments))
    _, found = sharded_loading.measure(sizes, {"TP": TP})
    for rank in found["TP"]:
        assert 0.49 < rank["part"] < 0.51
        for peak in ("load peak", "save peak", "load again peak"):
            assert rank[peak] < 0.65, peak  # the part, and some tensors
    for read in ("load read", "load again read"):
        assert 0.99 < sum(rank[read] for rank in found["TP"]) < 1.01, read
