"""Saving over an older checkpoint: killed at any moment, a folder loads as the old one, as the new one, or not."""

import os
import shutil
import signal
import sys

import pytest
import torch
from checkpoints import released_config
from safetensors.torch import load_file

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.saving_grinmoe import replacing_checkpoint

SHARDS = "40KB"
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # of Python's audit hooks


def make_model(value):
    """Every tensor and a setting have the value, 1 or 2."""
    model = GrinMoeForCausalLM(
        GrinMoeConfig.from_dict(released_config(torch_dtype="float32", num_experts_per_tok=value))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@pytest.fixture(scope="module")
def models():
    return {value: make_model(value) for value in (1, 2)}


def values_in(folder, **settings):
    """Which of the two checkpoints loads; none where loading is refused."""
    try:
        model = GrinMoeForCausalLM.from_pretrained(folder, **settings)
    except (OSError, ValueError) as error:
        return {"refused" if len(str(error)) > 40 else "refused without a sentence"}
    values = {value for tensor in model.parameters() for value in tensor.unique().tolist()}
    return values | {model.config.num_experts_per_tok}


def save_and_die(model, folder, moment, **settings):
    """Save in a process that kills itself before the `moment`-th thing it does in the folder; whether it did."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def count(event, arguments):
            nonlocal left
            if event in FILE_EVENTS and str(folder) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        model.save_pretrained(folder, **settings)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


@pytest.mark.parametrize(("old", "new"), [("1GB", SHARDS), (SHARDS, "1GB")], ids=["file to shards", "shards to file"])
def test_killed_at_every_moment(old, new, models, tmp_path):
    models[1].save_pretrained(tmp_path / "old", max_shard_size=old)
    found, moment, killed = [], 0, True
    while killed:
        moment += 1
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        killed = save_and_die(models[2], folder, moment, max_shard_size=new)
        found.append(values_in(folder))
    assert all(values in ({1}, {2}, {"refused"}) for values in found), "old and new in one model"
    assert found[0] == {1} and found[-1] == {2} and moment > 8
    # What a killed save leaves is gone after the next one.
    save_and_die(models[1], folder, moment // 2, max_shard_size=old)
    models[2].save_pretrained(folder, max_shard_size=new)
    models[2].save_pretrained(tmp_path / "new", max_shard_size=new)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "new"))


def test_variants_lie_side_by_side(models, tmp_path):
    models[1].save_pretrained(tmp_path, max_shard_size=SHARDS)
    models[1].save_pretrained(tmp_path, variant="fp16", max_shard_size=SHARDS)
    models[2].save_pretrained(tmp_path, variant="fp16")
    assert values_in(tmp_path, num_experts_per_tok=1) == {1}
    assert values_in(tmp_path, variant="fp16") == {2}
    assert not list(tmp_path.glob("model.fp16-*"))


def test_a_folder_that_a_model_still_reads_from(models, tmp_path):
    """Mapped files stay what they are, and offloaded tensors are read until the new files are complete."""
    models[1].save_pretrained(tmp_path, max_shard_size=SHARDS)
    mapped = load_file(next(tmp_path.glob("model-00003*")))
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    offloaded = GrinMoeForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload", num_experts_per_tok=2
    )
    offloaded.save_pretrained(tmp_path)
    assert values_in(tmp_path, num_experts_per_tok=1) == {1}
    models[2].save_pretrained(tmp_path)
    assert values_in(tmp_path) == {2}
    assert all((tensor == 1).all() for tensor in mapped.values())


@pytest.mark.parametrize("fails", ["before the weights", "after the weights"])
def test_an_error_leaves_the_old_or_the_new(fails, models, tmp_path):
    """After the weights there is the push, whose failure has cost nobody his files so far."""
    models[1].save_pretrained(tmp_path, max_shard_size=SHARDS)

    def save_and_fail():
        with replacing_checkpoint(tmp_path, "model.safetensors", "model.safetensors.index.json") as made:
            (models[2] if fails == "after the weights" else models[2].config).save_pretrained(made)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        save_and_fail()
    assert values_in(tmp_path) == ({2} if fails == "after the weights" else {1})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
