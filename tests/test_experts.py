"""More experts and fewer: against the model before, and against a router that has no choice."""

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert, open_checkpoint
from conversion.experts import prune, upcycle

IDS = torch.randint(0, 131, (3, 40), generator=torch.Generator().manual_seed(3))


def write(folder, seed=0, **overrides):
    config = released_config(**{"torch_dtype": "float32", "router_jitter_noise": 0.0, **overrides})
    return write_checkpoint(folder, config, released_tensors(config, seed), 2)


def write_dense(folder, **overrides):
    return write(folder, **{"num_local_experts": 1, "num_experts_per_tok": 1, **overrides})


def built(checkpoint, folder, dtype=torch.float32, **settings):
    """The model of a changed checkpoint, through files and transformers."""
    tensors = {name: tensor.read().contiguous() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype)
    write_checkpoint(folder, {**checkpoint.config.to_dict(), "model_type": "grinmoe"}, tensors)
    return load(folder, dtype, **settings)


def load(folder, dtype=torch.float64, **settings):
    """The model in a folder; other implementations of experts have no float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager", **settings).eval()


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids, output_router_logits=True)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- Upcycling ----


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("stored", "dtype", "tolerance"),
    [("float32", torch.float32, 2e-6), ("float32", torch.float64, 2e-7), ("float64", torch.float64, 1e-13)],
)
def test_copies_compute_what_the_one_expert_does(tmp_path, stored, dtype, tolerance, top_k):
    """Whatever the routers choose; stored in float32, a third is rounded and a half is not."""
    source = write_dense(tmp_path / "dense", torch_dtype=stored)
    dense = load(source, dtype)
    checkpoint = upcycle(open_checkpoint(source), 5, top_k=top_k)
    model = built(checkpoint, tmp_path / "upcycled", dtype)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (5, top_k)
    if top_k in (1, 2, 4) and dtype == torch.float64:
        tolerance = 1e-13
    assert relative_error(run(model).logits, run(dense).logits) < tolerance
    chosen = [logits.topk(top_k).indices.unique().numel() for logits in run(model).router_logits]
    assert chosen == [5, 5]  # the routers do choose


def test_copies_and_near_ties(tmp_path):
    """With the released keep set, the tokens whose experts are no near-ties, in the first layer and before any other
    token that they attend to; a sequence of one token is by itself."""
    source = write_dense(tmp_path / "dense", num_hidden_layers=1)
    dense = load(source)
    checkpoint = upcycle(open_checkpoint(source), 6)
    model = built(checkpoint, tmp_path / "upcycled", torch.float64, router_jitter_noise=0.05)
    ids = torch.arange(131)[:, None]
    found, expected = run(model, ids), run(dense, ids)
    error = (found.logits - expected.logits).abs().amax(dim=(1, 2)) / expected.logits.abs().max()
    [z] = found.router_logits
    best, second = z.topk(2).values.T[..., None]
    near_best = (best - z <= 0.1 * torch.maximum(z.abs(), best)) & (z < best)
    near_second = (second - z <= 0.1 * torch.maximum(z.abs(), second)) & (z < second)
    near = (near_best | near_second).any(dim=-1)
    assert 10 < near.sum() < 120
    assert (error[~near] < 1e-12).all()
    assert (error[near] > 1e-3).all()  # these are what the docstring says they are


def test_gshard_weights_sum_to_one(tmp_path):
    source = write_dense(tmp_path / "dense", router_estimator="gshard")
    dense = load(source)
    model = built(upcycle(open_checkpoint(source), 4, top_k=2), tmp_path / "upcycled", torch.float64)
    assert relative_error(run(model).logits, run(dense).logits) < 1e-7  # routing weights are float32


def test_noise_is_relative_to_each_matrix_and_each_copy_has_its_own(tmp_path):
    source = write_dense(tmp_path / "dense", hidden_size=64, intermediate_size=96)
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(source).tensors.items()}
    found = {}
    for seed in (0, 1):
        checkpoint = upcycle(open_checkpoint(source), 3, top_k=2, noise=0.25, seed=seed)
        for name, tensor in checkpoint.tensors.items():
            if ".experts." in name:
                original = tensors[f"{name.split('.experts.')[0]}.experts.0.{name.split('.')[-2]}.weight"]
                divisor = 2 if ".w2." in name else 1
                noise = (tensor.read() * divisor - original) / original.std()
                count = noise.numel() ** 0.5
                assert abs(noise.std() - 0.25) < 4 * 0.25 / (2**0.5 * count)
                assert abs(noise.mean()) < 4 * 0.25 / count
                found[seed, name] = noise.flatten()
    noises = torch.stack([noise for (_, name), noise in found.items()])
    correlation = torch.corrcoef(noises).fill_diagonal_(0)
    assert len(noises) == 2 * 2 * 3 * 3 and correlation.abs().max() < 5 / noises.shape[1] ** 0.5


def test_upcycling_is_reproducible_in_any_order(tmp_path):
    source = write_dense(tmp_path / "dense", torch_dtype="bfloat16", initializer_range=0.1)
    first, second = (upcycle(open_checkpoint(source), 4, noise=0.1, seed=7).tensors for _ in range(2))
    other = upcycle(open_checkpoint(source), 4, noise=0.1, seed=8).tensors
    backwards = {name: second[name].read() for name in reversed(list(second))}
    for name, tensor in first.items():
        assert torch.equal(tensor.read(), backwards[name])
        changes = ".experts." in name or ".gate." in name
        assert torch.equal(tensor.read(), other[name].read()) != changes
    routers = torch.cat([t.read().flatten().float() for name, t in first.items() if ".gate." in name])
    assert len(routers) == 2 * 4 * 32 and 0.08 < routers.std() < 0.12
    assert first["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"num_local_experts": 2}, {}, "num_local_experts=2: only a single expert"),
        ({}, {"num_experts": 1}, "num_experts=1: copies"),
        ({}, {"top_k": 5}, "top_k=5 is impossible for 4 experts"),
        ({}, {"top_k": 0}, "top_k=0 is impossible"),
        ({"router_estimator": "sparsemixer"}, {}, "top_k=2 is impossible for 4 experts chosen by sparsemixer"),
        ({"router_estimator": "dense"}, {}, "router_estimator='dense' with top_k=2 weights an expert by its prob"),
        ({"router_estimator": "gshard"}, {"top_k": 1}, "router_estimator='gshard' with top_k=1 weights"),
        ({}, {"noise": -0.1}, "noise=-0.1 is no standard deviation"),
        ({}, {"noise": float("nan")}, "noise=nan is no standard deviation"),
    ],
)
def test_upcycling_that_is_refused(tmp_path, settings, arguments, message):
    checkpoint = open_checkpoint(write_dense(tmp_path, **settings))
    with pytest.raises(ConversionError, match=message):
        upcycle(checkpoint, **{"num_experts": 4, **arguments})


# ---- Pruning ----


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
    ties = prune(open_checkpoint(source), shares, 3)
    router = ties.tensors["model.layers.1.block_sparse_moe.gate.weight"].read()
    assert torch.equal(router, whole["model.layers.1.block_sparse_moe.gate.weight"][[0, 2, 4]])


@pytest.mark.parametrize("top_k", [1, 2])
def test_pruning_equals_a_router_that_never_chooses_the_removed(tmp_path, top_k):
    """Removed experts have logits of minus infinity in the whole model; the released keep set."""
    source = write(tmp_path / "whole", num_experts_per_tok=top_k, router_jitter_noise=0.05)
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(2, 6, generator=generator)
    kept = shares.topk(3).indices
    model = built(prune(open_checkpoint(source), shares, 3), tmp_path / "pruned", torch.float64)
    whole = load(source)
    before = run(whole).logits
    for layer, experts in zip(whole.model.layers, kept, strict=True):
        removed = torch.ones(6, dtype=torch.bool).index_fill(0, experts, False)
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda gate, inputs, logits, removed=removed: logits.masked_fill(removed, -torch.inf)
        )
    with torch.no_grad():
        masked = whole(IDS).logits
    assert relative_error(run(model).logits, masked) < 1e-12
    assert relative_error(before, masked) > 0.01


def shares_of(model, ids, row_length=2048):
    """Each expert's share of a layer's tokens, `[L, E]`, from the routers' logits; a row sees none of the others."""
    counts = torch.zeros(2, 6, dtype=torch.float64)
    for row in ids.split(row_length):
        for layer, logits in enumerate(run(model, row[None]).router_logits):
            counts[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=6)
    return counts / counts.sum(dim=1, keepdim=True)


def test_experts_without_tokens_are_not_missed(tmp_path, trained_tokenizer):
    """Their routers' rows lie far on the wrong side of what the norms' biases give every token."""
    config = released_config(torch_dtype="float32", vocab_size=1024)
    tensors = released_tensors(config)
    for layer, idle in ((0, [1, 4]), (1, [0, 2])):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.post_attention_layernorm.bias"] += 1.0
        tensors[f"{prefix}.block_sparse_moe.gate.weight"][idle] = -1.0
    source = write_checkpoint(tmp_path / "whole", config, tensors)
    whole = load(source)
    text = "\n".join(f"def f{n}(x): return x + {n}" for n in range(200))
    shares = shares_of(whole, torch.tensor(trained_tokenizer(text).input_ids))
    assert shares[0, [1, 4]].sum() == shares[1, [0, 2]].sum() == 0 and (shares > 0).sum() == 8
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, dtype=torch.float64))
    model = built(prune(open_checkpoint(source), shares, 4), tmp_path / "pruned", torch.float64)
    ids = torch.tensor([trained_tokenizer(text).input_ids[:300]])
    assert relative_error(run(model, ids).logits, run(whole, ids).logits) < 1e-12
    fewer = built(prune(open_checkpoint(source), shares, 3), tmp_path / "fewer", torch.float64)
    assert relative_error(run(fewer, ids).logits, run(whole, ids).logits) > 0.01  # one that is missed


def test_load_is_that_of_the_whole_text(tmp_path, trained_tokenizer):
    """In rows of as many tokens as the model has positions for."""
    config = released_config(torch_dtype="float32", vocab_size=1024, max_position_embeddings=16)
    tensors = released_tensors(config)
    source = write_checkpoint(tmp_path / "whole", config, fused(tensors, config))
    trained_tokenizer.save_pretrained(source)
    text = "for i in range(10): print(i)\n" * 20
    (tmp_path / "text").write_text(text)
    report = convert(source, tmp_path / "hub", to="hub", num_experts=3, calibration=tmp_path / "text")
    shares = shares_of(load(source, torch.float32), torch.tensor(trained_tokenizer(text).input_ids), 16)
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


def test_calibration_texts_that_are_wrong(tmp_path, trained_tokenizer):
    source = write(tmp_path / "whole", vocab_size=100)
    (tmp_path / "text").write_text("import this")
    for path, content, message in (
        (tmp_path / "text", b"import this", "has no tokenizer"),
        (tmp_path / "text", b"import this", r"gives id \d+, the model has vocab_size=100"),
        (tmp_path / "empty", b"", "empty is empty"),
        (tmp_path / "image", b"\x89PNG\xff", "image is not a text in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=message):
            convert(source, tmp_path / "hub", to="hub", num_experts=3, calibration=path)
        trained_tokenizer.save_pretrained(source)


def test_upcycled_through_convert(tmp_path):
    """The proof that copies compute what the one expert does is part of the conversion."""
    source = write_dense(tmp_path / "dense")
    report = convert(source, tmp_path / "hub", to="hub", num_experts=4, top_k=2)
    assert report.difference < 1e-6 and "4 copies of the one expert, top-2" in report.notes[0]
    dense, mixture = load(source, torch.float64), load(tmp_path / "hub", torch.float64)
    mixture.config.router_jitter_noise = 0.0
    assert relative_error(run(mixture).logits, run(dense).logits) < 1e-6


def test_copies_that_are_not_scaled_are_refused(tmp_path, monkeypatch):
    """The proof is part of the conversion."""
    source = write_dense(tmp_path / "dense")
    monkeypatch.setattr("conversion.experts.DOWN_PROJECTION", "none")
    with pytest.raises(ConversionError, match=r"differs first in layers\.0"):
        convert(source, tmp_path / "hub", to="hub", num_experts=4)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_near_ties_of_copies_are_reported(tmp_path):
    source = write_dense(tmp_path / "dense", router_jitter_noise=0.3)
    [_, note] = convert(source, tmp_path / "hub", to="hub", num_experts=4).notes
    dense, mixture = load(source, torch.float64), load(tmp_path / "hub", torch.float64)
    ids = torch.randint(131, (4, 64), generator=torch.Generator().manual_seed(0))  # the check's
    expected, found = run(dense, ids).logits, run(mixture, ids).logits
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference > 0.01 and f"change them by {difference:.2g} " in note


@pytest.mark.parametrize("estimator", ["sparsemixer_v2_paper", "sparsemixer_v2_star"])
def test_copies_under_the_other_estimators(tmp_path, estimator):
    source = write_dense(tmp_path / "dense", router_estimator=estimator)
    assert convert(source, tmp_path / "hub", to="hub", num_experts=3).difference < 1e-6
