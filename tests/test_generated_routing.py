"""`generate` returns the routing of each step: against forward passes over the whole sequence."""

import pytest
import torch
from models import random_ids
from test_generation import build

pytestmark = pytest.mark.usefixtures("far_from_ties")
LENGTH, NEW = 9, 6
ASKED = {"return_dict_in_generate": True, "output_router_logits": True, "output_selected_experts": True}


def joined(steps):
    """Steps of layers `[T, ...]` -> `[layers, tokens, ...]`."""
    return torch.stack([torch.cat(layer) for layer in zip(*steps, strict=True)])


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}],
    ids=["dynamic cache", "static cache", "no cache", "speculative"],
)
@torch.no_grad()
def test_each_step_returns_its_routing(settings):
    model = build()
    ids = random_ids(1, LENGTH).repeat(1, 2)  # repeats itself, so that looked-up tokens are taken
    output = model.generate(ids, do_sample=False, max_new_tokens=NEW, **ASKED, **settings)
    whole = model(output.sequences[:, :-1], output_router_logits=True, output_selected_experts=True)
    experts = torch.stack(whole.selected_experts)
    if settings.get("use_cache") is False:  # each step is over all tokens
        assert len(output.selected_experts) == NEW
        assert torch.equal(torch.stack(output.selected_experts[-1]), experts)
        return
    assert torch.equal(joined(output.selected_experts), experts)
    torch.testing.assert_close(joined(output.router_logits), torch.stack(whole.router_logits), atol=1e-5, rtol=1e-5)
    if "prompt_lookup_num_tokens" not in settings:  # those steps may be over several tokens, or over rejected ones
        assert [len(step[0]) for step in output.selected_experts] == [2 * LENGTH, *[1] * (NEW - 1)]


@torch.no_grad()
def test_routing_is_returned_only_on_request():
    model = build()
    ids = random_ids(2, LENGTH)
    assert "router_logits" not in model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert torch.equal(
        model.generate(ids, do_sample=False, max_new_tokens=NEW, output_router_logits=True),
        model.generate(ids, do_sample=False, max_new_tokens=NEW),
    )
    beams = model.generate(ids, num_beams=2, max_new_tokens=3, **ASKED)
    assert [layer.shape for layer in beams.selected_experts[1]] == [(4, 2)] * 2


@torch.no_grad()
def test_generate_takes_a_tokenizer(trained_tokenizer):
    """As `transformers serve` and stop strings give it one."""
    model = build()
    ids = random_ids(1, LENGTH)
    expected = model.generate(ids, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=NEW, tokenizer=trained_tokenizer), expected)
