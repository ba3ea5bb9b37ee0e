"""`--to phimoe --for ENGINE`: refused where the engine would compute another function."""

import pytest
from checkpoints import released_config, released_tensors, write_checkpoint

from conversion import ConversionError, convert

PLAIN = {"lm_head_bias": False, "sliding_window": None}


@pytest.mark.parametrize(
    ("engine", "changes", "said"),
    [
        ("vllm", {}, "vLLM and SGLang leave out the head's bias"),
        ("vllm", {"sliding_window": None, "router_jitter_noise": 0.1}, "router_jitter_noise=0.01, not 0.1"),
        ("sglang", {"sliding_window": 7}, "has no sliding window: right up to 8 tokens only"),
        ("sglang", PLAIN, "build a bias of the head"),
        ("ollama", {}, "for must be one of transformers, vllm, sglang; got 'ollama'"),
    ],
)
def test_another_function_is_refused(engine, changes, said, tmp_path):
    config = released_config(**changes)
    source = write_checkpoint(tmp_path / "source", config, released_tensors(config))
    with pytest.raises(ConversionError, match=said):
        convert(source, tmp_path / "result", to="phimoe", engine=engine)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_transformers_has_the_same_function(tmp_path):
    config = released_config()
    source = write_checkpoint(tmp_path / "source", config, released_tensors(config))
    report = convert(source, tmp_path / "result", to="phimoe", engine="transformers")
    assert report.notes == [] and report.difference < 1e-6
    with pytest.raises(ConversionError, match="engine=vllm would have no effect"):
        convert(source, tmp_path / "other", to="hub", engine="vllm")
