"""Files are there as a whole, or as they were."""

from contextlib import suppress

import pytest

from modeling_grin.files import replacing, write_whole


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
