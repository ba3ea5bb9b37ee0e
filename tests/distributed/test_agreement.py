"""What ends a run ends it on all ranks, with one sentence."""

import agreement_runs
import pytest
import runs
import torch
from cases import run_cases
from torch.distributed.checkpoint.api import CheckpointException

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.training.checkpoints import find_non_finite, last_complete_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    runs.make_model().save_pretrained(folder / "start")
    return folder


@pytest.fixture(scope="module")
def errors(folder):
    """What is wrong -> what both ranks say."""
    first, second = run_cases("agreement_runs", folder, 2, {"both": {"run": "stop"}})["both"]
    assert first == second
    return first


@pytest.mark.parametrize("name", ["seed", "max_steps", "learning_rate", "config"])
def test_ranks_with_other_settings_are_told_before_the_first_step(errors, name):
    field = "config.router_aux_loss_coef" if name == "config" else name
    values = agreement_runs.SETTINGS.get(name, [0.1, 0.2])
    message = errors[name]
    assert message.startswith("ranks 0 and 1 differ in ") and f"{field} ({values[0]} and {values[1]})" in message


@pytest.mark.parametrize("layout", [*agreement_runs.LAYOUTS, "pipeline"])
def test_a_nan_on_one_rank_stops_all_of_them(folder, errors, layout):
    """The only checkpoint that is kept is that of the step before."""
    assert errors[layout].startswith("step 2: the norm of the gradients is nan")
    checkpoint, incomplete = last_complete_checkpoint(folder / layout)
    assert checkpoint == str(folder / layout / "checkpoint-1") and not incomplete
    assert find_non_finite(checkpoint) is None


def test_a_distributed_save_replaces_an_older_one_whole(folder, errors):
    """transformers loads every shard it finds: stale ones of an earlier save, or only some of the new ones."""
    loaded = GrinMoeForCausalLM.from_pretrained(folder / "saved").state_dict()
    for name, tensor in GrinMoeForCausalLM.from_pretrained(folder / "start").state_dict().items():
        assert torch.equal(loaded[name], tensor)
    assert not (folder / "saved" / ".incomplete").exists()
    assert len(list((folder / "failed").glob("shard-*"))) == 1
    with pytest.raises(CheckpointException, match="header too small"):
        GrinMoeForCausalLM.from_pretrained(folder / "failed", config=folder / "start")
