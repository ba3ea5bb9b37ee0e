"""Routing noise: the published generator, its statistics, and that it depends on seed, step, layer and token alone."""

import math

import pytest
import torch

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, draw_noise, modeling_grinmoe, route
from modeling_grin.noise_grinmoe import fold_in, random_key, splitmix64, step_key, token_keys, uniform

GOLDEN_RATIO = 0x9E3779B97F4A7C15


def splitmix64_numbers(seed, n):
    """Steele, Lea and Flood's generator in Python's integers: its first n numbers."""
    word = (1 << 64) - 1
    numbers = []
    for i in range(1, n + 1):
        z = (seed + i * GOLDEN_RATIO) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        numbers.append(z ^ (z >> 31))
    return numbers


def test_is_the_published_generator():
    # The test vector that ports of SplitMix64 are checked with: seed 1234567.
    assert splitmix64_numbers(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = [1234567, 0, -1, 2**63 - 1, -(2**63)]
    ours = splitmix64(torch.tensor(keys)[:, None], torch.arange(1, 51))
    for row, key in zip(ours.tolist(), keys, strict=True):
        assert [n % 2**64 for n in row] == splitmix64_numbers(key * GOLDEN_RATIO, 50)


def test_uniform_numbers_are_the_upper_bits_of_each_half():
    numbers = uniform(torch.tensor([42]), 7)
    expected = [half for z in splitmix64_numbers(42 * GOLDEN_RATIO, 4) for half in (z & 0xFFFFFFFF, z >> 32)][:7]
    assert numbers.dtype == torch.float32
    assert numbers[0].tolist() == [((half >> 9) + 0.5) / 2**23 for half in expected]
    assert numbers.min() > 0 and numbers.max() < 1
    extremes = torch.tensor([0, 2**23 - 1]).float().add(0.5).mul(2.0**-23)
    assert (-(-extremes.log()).log()).isfinite().all(), "the Gumbel noise of the smallest and the largest"


def test_statistics():
    """Moments, and correlations between neighbours in token, number, layer and step, within five standard errors."""
    ids = torch.randint(0, 50, (64, 32), generator=torch.Generator().manual_seed(0))
    counted, positions = torch.ones_like(ids, dtype=torch.bool), torch.arange(32).expand(64, 32)
    draws = torch.stack(
        [
            uniform(fold_in(token_keys(step_key(7, step), ids, counted, positions), layer), 40)
            for step in range(3)
            for layer in range(3)
        ]
    ).reshape(3, 3, 64 * 32, 40)
    n = draws.numel()
    centred = draws.double() - 0.5
    assert abs(centred.mean()) < 5 / math.sqrt(12 * n)
    assert abs((12 * centred**2).mean() - 1) < 5 * math.sqrt(0.8 / n)
    histogram = torch.histc(draws, 64, 0, 1).double()
    expected = n / 64
    chi_square = ((histogram - expected) ** 2 / expected).sum()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    for dim in range(4):
        here, there = centred.narrow(dim, 0, centred.shape[dim] - 1), centred.narrow(dim, 1, centred.shape[dim] - 1)
        assert abs(12 * (here * there).mean()) < 5 / math.sqrt(here.numel()), dim


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.2]).expand(100_000, 5)
    noise = draw_noise(logits, 2, torch.Generator().manual_seed(0))
    for k in range(2):
        frequency = torch.bincount((logits + noise.gumbel[k]).argmax(-1), minlength=5) / len(logits)
        probs = logits[0].softmax(-1)
        assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / len(logits)).sqrt()).all()
    assert abs(torch.corrcoef(torch.stack([noise.uniform[0], noise.gumbel[0, :, 4]]))[0, 1]) < 5 / math.sqrt(100_000)


def test_a_token_is_known_by_the_ids_up_to_it_however_padded_and_batched():
    rows = [[5, 6, 7, 8], [5, 6, 9], [7]]
    key = step_key(0, 3)

    def keys_of(batch, length, left):
        padding = [[0] * (length - len(row)) for row in batch]
        ids = torch.tensor([p + row if left else row + p for row, p in zip(batch, padding, strict=True)])
        ones = [[1] * len(row) for row in batch]
        mask = torch.tensor([p + one if left else one + p for one, p in zip(ones, padding, strict=True)]).bool()
        return token_keys(key, ids, mask, mask.cumsum(-1) - 1)[mask.flatten()].tolist()

    together = keys_of(rows, 4, left=True)
    assert keys_of(rows, 9, left=False) == together
    assert [token for row in rows for token in keys_of([row], len(row), left=True)] == together
    assert together[:2] == together[4:6], "the same ids up to here"
    packed = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    everything = torch.ones_like(packed, dtype=torch.bool)
    assert token_keys(key, packed, everything, positions).tolist() == together, "one row, or several"
    assert len(set(together)) == len(together) - 2, "any other token has a key of its own"
    holes = torch.tensor([[5, 0, 6, 0, 0, 7, 8]])
    mask = holes != 0
    assert token_keys(key, holes, mask, mask.cumsum(-1) - 1)[mask.flatten()].tolist() == together[:4]
    swapped = token_keys(key, torch.tensor([[6, 5]]), torch.ones(1, 2, dtype=torch.bool), torch.arange(2)[None])
    assert not set(swapped.tolist()) & set(together), "the order of the ids counts"
    other = token_keys(
        step_key(0, 4), torch.tensor([rows[0]]), torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None]
    )
    assert not set(other.tolist()) & set(together), "and another one in another step"
    assert step_key(0, 3) != step_key(3, 0)


@pytest.fixture
def model():
    config = GrinMoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=6, router_jitter_noise=0.5, input_jitter_noise=0.1,
        initializer_range=0.3, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return GrinMoeForCausalLM(config).train()


def test_a_step_decides_the_noise_and_a_seed_does_where_there_is_none(model):
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))

    def logits(step=None, seed=0, generator_seed=0, rows=slice(None)):
        torch.manual_seed(generator_seed)
        model.begin_step(step, seed=seed)
        with torch.no_grad():
            return model(ids[rows]).logits

    first = logits(step=5, seed=1)
    assert torch.equal(logits(step=5, seed=1, generator_seed=99), first), "torch's generator has no part in it"
    torch.testing.assert_close(
        torch.cat([logits(5, 1, rows=slice(2, 4)), logits(5, 1, rows=slice(0, 2))]).roll(2, 0), first
    )
    assert not torch.allclose(logits(step=6, seed=1), first, rtol=1e-2)
    assert not torch.allclose(logits(step=5, seed=2), first, rtol=1e-2)
    without = logits(generator_seed=3)
    assert torch.equal(logits(generator_seed=3), without)
    assert not torch.allclose(logits(generator_seed=4), without, rtol=1e-2)


def test_a_forward_pass_without_a_step_takes_one_number_from_torchs_generator(model):
    torch.manual_seed(0)
    model(torch.arange(8)[None])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    random_key()
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()(torch.arange(8)[None])
    assert torch.equal(torch.get_rng_state(), state), "inference draws nothing"


def test_packed_sequences_draw_what_they_draw_alone(model):
    """As in TRL's padding-free batches: no mask, positions that start again."""
    sequences = [torch.randint(0, 64, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 2)]
    model.begin_step(3)
    with torch.no_grad():
        alone = torch.cat([model(ids, use_cache=False).logits for ids in sequences], dim=1)
        positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])[None]
        packed = model(torch.cat(sequences, dim=1), position_ids=positions, use_cache=False).logits
        unaware = model(torch.cat(sequences, dim=1), use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert (unaware - alone).abs().max() > 1e-2


def test_embeddings_without_ids_on_another_device_than_the_cpu():
    config = GrinMoeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        intermediate_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = GrinMoeForCausalLM(config).to(torch.bfloat16).train()
        embeddings, mask = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((2, 8, 16), (2, 1, 8, 8)))
    keys = []
    model.model.layers[0].block_sparse_moe.register_forward_pre_hook(lambda module, args: keys.append(args[1].keys))
    model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    assert keys[0].device.type == "meta" and keys[0].shape == (2, 16)


def test_embeddings_without_ids_are_sampled_by_row_and_position(model):
    embeddings = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 8, 16)
    model.begin_step(0)
    with torch.no_grad():
        output = model.model(inputs_embeds=embeddings, output_selected_experts=True)
    first = output.selected_experts[0]
    assert (first != first[0]).any(), "equal embeddings, different draws"


def test_routing_and_input_jitter_draw_different_noise(model, monkeypatch):
    seen = {}

    def watch(*args, **kwargs):
        seen["routing"] = kwargs["keys"]
        return route(*args, **kwargs)

    monkeypatch.setattr(modeling_grinmoe, "route", watch)
    block = model.model.layers[0].block_sparse_moe
    block.gate.register_forward_pre_hook(lambda module, args: seen.update(jittered=args[0]))
    block(torch.ones(1, 50, 16))
    numbers = (seen["jittered"] - 0.9) / 0.2  # U(0.9, 1.1) of ones
    assert abs(torch.corrcoef(torch.stack([numbers.flatten(), uniform(seen["routing"], 16).flatten()]))[0, 1]) < 0.2


def test_layers_draw_different_noise(model):
    seen = []
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].detach().clone())
        )
    state = torch.ones(1, 4, 16)
    original = [layer.block_sparse_moe.forward for layer in model.model.layers]
    for layer, forward in zip(model.model.layers, original, strict=True):
        layer.block_sparse_moe.forward = lambda states, *args, forward=forward: forward(state, *args)
    model(torch.arange(4)[None])
    jitters = torch.stack(seen).flatten(1)
    assert jitters.unique(dim=0).shape[0] == 3
    assert jitters.flatten().unique().numel() == jitters.numel()
