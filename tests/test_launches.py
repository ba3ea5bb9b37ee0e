"""Kernel launches of a layer at the released sizes, counted on the meta device, against stock models."""

import pytest

from benchmarks.gpu.launches import count_all
from modeling_grin import GrinMoeConfig


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


def test_the_known_parts_of_a_mistral_layer_are_counted(counted):
    """Seven products forward and fourteen backward, one flash kernel forward and three backward, no experts."""
    operators = counted["mistral"]["layer"]
    forward, backward = (operators[part]["by_operator"] for part in ("train_forward", "train_backward"))
    assert (forward["mm"], backward["mm"]) == (7, 14)
    assert (forward["flash attention"], backward["flash attention"]) == (1, 3)
    assert "_grouped_mm" not in forward | backward


def test_our_kernels_count_as_one(counted):
    operators = counted["ours"]["layer"]
    assert {name: operators["train_forward"]["by_operator"][name] for name in ("jitter", "choose")} == {
        "jitter": 1, "choose": 1
    }  # fmt: skip


def test_rows_beyond_the_window_stay_in_flash():
    """Counting fails where SDPA gets a mask."""
    found = count_all(GrinMoeConfig(), rows=2, length=4096, batch_size=1)["ours"]["layer"]
    forward, backward = (found[part]["by_operator"] for part in ("train_forward", "train_backward"))
    assert (forward["_flash_attention_forward"], backward["_flash_attention_backward"]) == (1, 3)
