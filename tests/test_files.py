"""Files are there as a whole, or as they were."""

import os
import stat
from contextlib import suppress

import pytest
from runs import make_model, make_trainer

from conversion import convert
from modeling_grin.files import replacing, write_whole
from modeling_grin.publishing.card import write_card
from modeling_grin.training import add_lora


@pytest.mark.parametrize("content", ["new ✓", b"\x00new"])
def test_what_is_written_takes_the_place_of_what_was(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("a longer one that was")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_written_to_its_end_leaves_what_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with suppress(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    """Not that of safetensors, 0600: models, a trainer's checkpoints with and without LoRA, conversions, cards."""
    before = os.umask(umask)
    try:
        model = make_model()
        for _ in range(2):  # over an older checkpoint, too
            model.save_pretrained(tmp_path / "model")
            model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        make_trainer(tmp_path / "run", model, max_steps=1, save_strategy="steps", save_steps=1).train()
        adapted = make_trainer(
            tmp_path / "lora", add_lora(model, r=2), max_steps=1, save_strategy="steps", save_steps=1
        )
        adapted.train()
        adapted.save_model()
        for to in ("fused", "phimoe"):
            convert(tmp_path / "model", tmp_path / to, to=to)
        write_card(tmp_path / "model", force=True)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md", ".pt"}
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o666 & ~umask} == {}
    assert not list(tmp_path.rglob(".*")), "nothing is left"
