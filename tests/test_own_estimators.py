"""Estimators of a user's own: registered from the user's code, saved, carried, and rescued where they are unknown."""

import logging
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from models import tiny_model
from transformers import AutoModelForCausalLM

from modeling_grin import ROUTER_ESTIMATORS, GrinMoeConfig, Routing, router_estimator
from modeling_grin.carried_estimator_grinmoe import ESTIMATOR_FILE
from modeling_grin.routing_grinmoe import RouterEstimator

IDS = torch.arange(20)[None]
OWN_FILE = dedent(
    '''
    """Switch's rule for any number of choices."""

    from modeling_grin import Routing, router_estimator


    @router_estimator("switch", sampled=False, travels={travels})
    def switch(router_logits, top_k, jitter_eps, noise):
        weights, experts = router_logits.softmax(dim=-1).topk(top_k, dim=-1)
        return Routing(weights, experts)
    '''
)


@pytest.fixture(autouse=True)
def forget_switch(monkeypatch):
    """After each test, and when called, nobody knows "switch"."""
    monkeypatch.setattr("modeling_grin.routing_grinmoe.ROUTER_ESTIMATORS", ROUTER_ESTIMATORS)
    yield lambda: ROUTER_ESTIMATORS.pop("switch", None)
    ROUTER_ESTIMATORS.pop("switch", None)


def run_file(folder, travels=False):
    path = folder / "mine.py"
    path.write_text(OWN_FILE.format(travels=travels))
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "mine"})


def test_the_decorator_keeps_the_function_and_records_the_facts():
    @router_estimator("switch", sampled=False, equation=7, max_top_k=1)
    def switch(router_logits, top_k, jitter_eps, noise):
        return Routing(*router_logits.softmax(-1).topk(top_k))

    assert ROUTER_ESTIMATORS["switch"] == RouterEstimator(switch, sampled=False, equation=7, max_top_k=1)
    with pytest.raises(ValueError, match="must be at most 1: router_estimator='switch'"):
        GrinMoeConfig(router_estimator="switch")
    weights = tiny_model(router_estimator="switch", num_experts_per_tok=1).train()(IDS, labels=IDS).loss
    assert torch.isfinite(weights)


@pytest.mark.parametrize("training", [False, True])
def test_an_unknown_name_fails_at_the_first_routing(training):
    model = tiny_model(router_estimator="switch").train(training)
    with pytest.raises(ValueError, match=r"'switch' is unknown; use one of .*'gshard'.*run the code that registers"):
        model(IDS)


def test_another_estimator_rescues_a_checkpoint(tmp_path, forget_switch, caplog):
    """Saved in a process that knows the estimator, loaded in one that does not."""
    run_file(tmp_path)
    model = tiny_model(router_estimator="switch")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING", "transformers"):
        model.save_pretrained(tmp_path / "model")
    assert "router_estimator='switch', which is defined in mine, which does not travel" in caplog.text
    assert not (tmp_path / "model" / ESTIMATOR_FILE).exists()
    expected = model(IDS).logits
    forget_switch()
    rescued = AutoModelForCausalLM.from_pretrained(tmp_path / "model", router_estimator="gshard")
    assert torch.isfinite(rescued(IDS).logits).all()
    for trusted in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=trusted)
        with pytest.raises(ValueError, match="'switch' is unknown"):
            loaded(IDS)
    run_file(tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)


def test_a_checkpoint_carries_the_function_and_runs_it_if_trusted(tmp_path, forget_switch):
    run_file(tmp_path, travels=True)
    model, folder = tiny_model(router_estimator="switch"), tmp_path / "model"
    expected = model(IDS).logits
    model.save_pretrained(folder)
    assert (folder / ESTIMATOR_FILE).read_text() == (tmp_path / "mine.py").read_text()
    forget_switch()
    AutoModelForCausalLM.from_pretrained(folder)
    assert "switch" not in ROUTER_ESTIMATORS
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(loaded(IDS).logits, expected)
    Path(tmp_path / "mine.py").unlink()
    for again in (tmp_path / "again", folder):  # from the file that was carried, over itself as well
        loaded.save_pretrained(again)
        assert (again / ESTIMATOR_FILE).read_text() == OWN_FILE.format(travels=True)


def test_a_function_without_a_file_cannot_travel(tmp_path):
    exec(OWN_FILE.format(travels=True), {"__name__": "__main__"})
    with pytest.raises(ValueError, match="travels=True and must be defined in a file; got <string>"):
        tiny_model(router_estimator="switch").save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ROUTER_ESTIMATORS)
def test_the_library_s_own_travel_with_its_code(name, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING", "transformers"):
        GrinMoeConfig(router_estimator=name, num_experts_per_tok=1).save_pretrained(tmp_path)
    assert "router_estimator" not in caplog.text
    assert not (tmp_path / ESTIMATOR_FILE).exists()
