"""The versions of transformers: those that are refused, in one sentence, and what needs a newer one."""

import ast
import runpy
from pathlib import Path

import pytest
import transformers
from checkpoints import released_config, released_tensors, write_checkpoint
from transformers.distributed import DistributedConfig

from modeling_grin import GrinMoeForCausalLM, compat_grinmoe
from modeling_grin.training.pipeline import check_pipeline

PACKAGE = Path(compat_grinmoe.__file__).parent


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1", "6.0.0"])
def test_other_versions_are_refused_in_one_sentence(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=f"must be 5.17 or later, and below 6, for GRIN-MoE; got {version}; do pip"):
        runpy.run_path(compat_grinmoe.__file__)


@pytest.mark.parametrize("name", ["configuration", "modeling", "tokenization"])
def test_modules_that_transformers_loads_check_the_version_first(name):
    """Else the sentence would come after an ImportError of something that the version lacks."""
    statements = ast.parse((PACKAGE / f"{name}_grinmoe.py").read_text(encoding="utf-8")).body
    first = next(node for node in statements if isinstance(node, ast.Import | ast.ImportFrom))
    assert (first.level, first.module) == (1, "compat_grinmoe")


def test_layouts_say_which_version_they_need(tmp_path, monkeypatch):
    config = released_config(torch_dtype="float32")
    folder = write_checkpoint(tmp_path, config, released_tensors(config))
    monkeypatch.setattr(compat_grinmoe, "TRANSFORMERS", (5, 22))
    for settings in ({"distributed_config": DistributedConfig(fsdp_size=2)}, {"tp_plan": "auto"}):
        with pytest.raises(ValueError, match=r"must be 5.23 or later for FSDP2, tensor and pipeline parallelism"):
            GrinMoeForCausalLM.from_pretrained(folder, **settings)
    with pytest.raises(ValueError, match=r"must be 5.23 or later"):
        check_pipeline(GrinMoeForCausalLM.from_pretrained(folder).config, 2)
