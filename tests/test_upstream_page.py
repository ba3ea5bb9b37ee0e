"""Faults of other projects that we work around: each reproduction of docs/upstream.md still shows its fault.

With the tested versions a fault that no longer shows fails its test, which names the workaround that can go. With
other versions it is a skip that says the same (`-rs`).
"""

import re
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from snippets import ROOT, run_snippets

PAGE = (ROOT / "docs" / "upstream.md").read_text("utf-8")
ENTRIES = re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
PROJECTS = ("accelerate", "bitsandbytes", "peft", "safetensors", "torch", "transformers", "trl")
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:1].isalpha()]
OTHER_VERSIONS = [
    f"{pin.name} {version(pin.name)}"
    for pin in PINS
    if pin.name in PROJECTS and not pin.specifier.contains(version(pin.name).split("+")[0])
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit status and output of each reproduction, in the environment of the tests, without this package."""
    found = [re.findall(r"```python\n(.*?)```", entry, re.DOTALL) for _, entry in ENTRIES]
    release, folder = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("entries")
    outcomes = run_snippets([snippet for (snippet,) in found], folder, release, HF_HUB_OFFLINE="1")
    return dict(zip(dict(ENTRIES), outcomes, strict=True))


@pytest.mark.parametrize("title", dict(ENTRIES))
def test_fault_still_shows(title, outcomes):
    (workaround,) = re.findall(r'"mended upstream: .*?([\w/]+\.(?:py|md))', dict(ENTRIES)[title])
    assert (ROOT / workaround).is_file()
    status, output = outcomes[title]
    mended = re.search(r"^AssertionError: (mended upstream: .*)", output, re.MULTILINE)
    if mended and OTHER_VERSIONS:
        pytest.skip(f"with {', '.join(OTHER_VERSIONS)} {mended[1]}")
    assert status == 0, mended[1] if mended else output
