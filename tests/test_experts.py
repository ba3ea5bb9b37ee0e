"""More experts and fewer: against the model before, and against a router that has no choice."""

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert, open_checkpoint
from conversion.experts import prune, upcycle

IDS = torch.randint(0, 131, (3, 40), generator=torch.Generator().manual_seed(3))


def write(folder, **overrides):
    config = released_config(**{"torch_dtype": "float32", "router_jitter_noise": 0.0, **overrides})
    return write_checkpoint(folder, config, released_tensors(config), 2)


def write_dense(folder, **overrides):
    return write(folder, **{"num_local_experts": 1, "num_experts_per_tok": 1, **overrides})


def built(checkpoint, folder, **settings):
    """The model of a changed checkpoint, through files and transformers."""
    tensors = {name: tensor.read().contiguous() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype)
    write_checkpoint(folder, {**checkpoint.config.to_dict(), "model_type": "grinmoe"}, tensors)
    return load(folder, **settings)


def load(folder, dtype=torch.float64, **settings):
    """The model in a folder; other implementations of experts have no float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager", **settings).eval()


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids, output_router_logits=True)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- Upcycling


@pytest.mark.parametrize(("top_k", "tolerance"), [(1, 1e-13), (2, 1e-13), (3, 2e-7), (4, 1e-13)])
def test_copies_compute_what_the_one_expert_does(tmp_path, top_k, tolerance):
    """Whatever the routers choose; stored in float32, a third is rounded and a half is not."""
    source = write_dense(tmp_path / "dense")
    model = built(upcycle(open_checkpoint(source), 5, top_k), tmp_path / "upcycled")
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (5, top_k)
    found = run(model)
    assert relative_error(found.logits, run(load(source)).logits) < tolerance
    assert [logits.topk(top_k).indices.unique().numel() for logits in found.router_logits] == [5, 5]


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, (1, 1), "got 1, 1"),
        ({}, (4, 5), "got 4, 5"),
        ({}, (4, 0), "got 4, 0"),
        ({"router_estimator": "dense"}, (4, 2), "got 4, 2, dense"),
    ],
)
def test_upcycling_that_is_refused(tmp_path, settings, arguments, message):
    checkpoint = open_checkpoint(write_dense(tmp_path, **settings))
    with pytest.raises(ConversionError, match=message):
        upcycle(checkpoint, *arguments)


# ---- Pruning


def test_the_most_loaded_experts_are_kept_in_their_order(tmp_path):
    source = write(tmp_path / "whole", torch_dtype="bfloat16")
    shares = torch.tensor([[0.1, 0.3, 0.05, 0.3, 0.05, 0.2], [0.2, 0.1, 0.2, 0.1, 0.2, 0.2]], dtype=torch.float64)
    kept = [[0, 1, 3, 5], [0, 2, 4, 5]]
    checkpoint = prune(open_checkpoint(source), shares, 4)
    whole = {name: tensor.read() for name, tensor in open_checkpoint(source).tensors.items()}
    assert len(checkpoint.tensors) == len(whole) - 2 * 2 * 3
    for name, tensor in checkpoint.tensors.items():
        expected = whole[name]
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if ".gate." in name:
            expected = expected[kept[layer]]
        elif ".experts." in name:
            parts = name.split(".")
            parts[5] = str(kept[layer][int(parts[5])])
            expected = whole[".".join(parts)]
        assert torch.equal(tensor.read(), expected), name
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    ties = prune(open_checkpoint(source), shares, 3)
    assert torch.equal(ties.tensors[gate].read(), whole[gate][[0, 2, 4]])
    for wrong in (1, 6, 7):
        with pytest.raises(ConversionError, match=f"num_experts must be at least .* got {wrong}"):
            prune(open_checkpoint(source), shares, wrong)


@pytest.mark.parametrize("top_k", [1, 2])
def test_pruning_equals_a_router_that_never_chooses_the_removed(tmp_path, top_k):
    """Removed experts have logits of minus infinity in the whole model; the released keep set."""
    source = write(tmp_path / "whole", num_experts_per_tok=top_k, router_jitter_noise=0.05)
    shares = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    model = built(prune(open_checkpoint(source), shares, 3), tmp_path / "pruned")
    whole = load(source)
    before = run(whole).logits
    for layer, experts in zip(whole.model.layers, shares.topk(3).indices, strict=True):
        removed = torch.ones(6, dtype=torch.bool).index_fill(0, experts, False)
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda gate, inputs, logits, removed=removed: logits.masked_fill(removed, -torch.inf)
        )
    with torch.no_grad():
        masked = whole(IDS).logits
    assert relative_error(run(model).logits, masked) < 1e-12
    assert relative_error(before, masked) > 0.01


def test_load_is_that_of_the_whole_text(tmp_path, trained_tokenizer):
    """In rows of as many tokens as the model has positions for; counted here from the routers' logits."""
    config = released_config(torch_dtype="float32", vocab_size=1024, max_position_embeddings=16)
    tensors = released_tensors(config)
    source = write_checkpoint(tmp_path / "whole", config, fused(tensors, config))
    trained_tokenizer.save_pretrained(source)
    text = "for i in range(10): print(i)\n" * 20
    (tmp_path / "text").write_text(text)
    report = convert(source, tmp_path / "hub", to="hub", num_experts=3, calibration=tmp_path / "text")
    model, counts = load(source, torch.float32), torch.zeros(2, 6, dtype=torch.float64)
    for row in torch.tensor(trained_tokenizer(text).input_ids).split(16):
        for layer, logits in enumerate(run(model, row[None]).router_logits):
            counts[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=6)
    shares = counts / counts.sum(dim=1, keepdim=True)
    found = load_file(tmp_path / "hub" / "model.safetensors")
    for layer in range(2):
        kept = sorted(shares[layer].topk(3).indices.tolist())
        prefix = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(found[f"{prefix}.gate.weight"], tensors[f"{prefix}.gate.weight"][kept])
        for new, old in enumerate(kept):
            matrices = (f"{prefix}.experts.{expert}.w2.weight" for expert in (new, old))
            assert torch.equal(found[next(matrices)], tensors[next(matrices)])
    kept_shares = shares.topk(3, dim=1).values.sum(dim=1)
    assert f"{kept_shares.min():.1%} to {kept_shares.max():.1%}" in report.notes[0]
