"""Kernel launches of a layer at the released sizes, counted on the meta device, against stock models."""

import pytest
import torch
from checkpoints import released_config
from transformers import StaticCache

from benchmarks.gpu.launches import count_all
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM


@pytest.fixture(scope="module")
def counted():
    return count_all(GrinMoeConfig(router_aux_loss_coef=0.01), rows=4, length=2048, batch_size=1)


def test_a_training_layer_launches_no_more_than_stock_phimoe(counted):
    ours, stock = (counted[name]["train_forward"] + counted[name]["train_backward"] for name in ("ours", "phimoe"))
    assert ours <= 1.1 * stock


def test_a_decoding_layer_launches_no_more_than_stock_phimoe(counted):
    assert counted["ours"]["decode"] <= counted["phimoe"]["decode"]


def test_no_layer_waits_for_the_host(counted):
    assert {name: own["syncs"] for name, own in counted.items()} == dict.fromkeys(counted, 0)


def test_rows_beyond_the_window_stay_in_flash():
    """Counting fails where SDPA gets a mask."""
    found = count_all(GrinMoeConfig(), rows=2, length=4096, batch_size=1)["ours"]["layer"]
    forward, backward = (found[part]["by_operator"] for part in ("train_forward", "train_backward"))
    assert (forward["_flash_attention_forward"], backward["_flash_attention_backward"]) == (1, 3)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_decoding_step_has_no_cpu_tensor_in_its_graph(masked):
    """One would keep `mode="reduce-overhead"` from CUDA graphs. The meta device stands for a GPU."""
    torch._dynamo.reset()  # it would take numbers that an earlier test has varied for tensors
    config = released_config(sliding_window=7)
    with torch.device("meta"):
        model = GrinMoeForCausalLM._from_config(GrinMoeConfig(**config), dtype=torch.bfloat16).eval()
    devices = set()

    def look(graph, inputs):
        tensors = (node.meta.get("example_value") for node in graph.graph.nodes)
        devices.update(tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor))
        return graph.forward

    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    cache = StaticCache(config=model.config, max_cache_len=20)
    embeds = model(ids, past_key_values=cache, output_hidden_states=True).hidden_states[-1]
    step = {"input_ids": ids[:, :1], "position_ids": ids[:, :1], "past_key_values": cache}
    if masked:  # as `generate` makes it beforehand
        mask = torch.ones(2, 6, dtype=torch.int64, device="meta")
        step["attention_mask"] = model.create_masks_for_generate(model.config, embeds[:, :1], mask, cache, ids[:, :1])
    torch.compile(model, fullgraph=True, backend=look)(**step)
    assert devices == {"meta"}
