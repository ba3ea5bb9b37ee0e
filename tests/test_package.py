"""The wheel: what it holds, what it asks for, and that it works where the checkout is out of sight."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from snippets import DOCUMENTS, bash_lines, run_snippets, snippets

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_grin", "conversion", "grin_moe_cli", "grin_moe_serving", "recipes", "model_cards")
BUILD_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd, **env):
    """Run a command; its whole output is the failure text."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments, cwd):
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd, PIP_NO_INDEX="1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that no earlier build in the checkout can leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("grin_moe-*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in shipped} <= set(PACKAGES)
    for package in PACKAGES:
        wanted = {
            path for suffix in ("py", "yaml", "typed", "md", "html") for path in (ROOT / package).rglob(f"*.{suffix}")
        }
        missing = {path.relative_to(ROOT).as_posix() for path in wanted} - shipped
        assert not missing, f"not in the wheel: {sorted(missing)}"


def test_tested_versions_satisfy_the_declared_ranges(metadata):
    declared = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        declared.setdefault(canonicalize_name(requirement.name), requirement.specifier)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (version,) = [specifier.version for specifier in pin.specifier if specifier.operator == "=="]
        assert version in declared[canonicalize_name(pin.name)], f"{pin} is outside setup.py's range"
    untested = {"flash-attn"}  # needs a GPU
    assert set(declared) - untested == {canonicalize_name(pin.name) for pin in pins}
    assert pins[0].name == "torch", "torch is installed first"


# The README's install line, then every Python snippet, with the newest versions that setup.py allows.

README = ROOT / "README.md"
BESIDE = {"llama"}  # extras whose installation takes minutes


def install_lines(document):
    """Arguments of the `pip install` lines of a document."""
    return [shlex.split(line)[2:] for line in bash_lines(document) if line.startswith("pip install")]


def extras(document):
    """The extras that a page needs beyond the README's."""
    named = {extra for line in install_lines(document) for word in line for extra in re.findall(r"\w+(?=[\],])", word)}
    return named - BESIDE - {"train"}


@pytest.fixture(scope="module")
def fresh_environment(wheel, tmp_path_factory):
    """The Python of an environment made by the README's install lines, and a function that installs more there.

    The wheel stands for the repository's address. The build of torch depends on the machine and can be GBs, so the one
    that runs this test is linked. Compiling unused modules is left out. Needs a package registry.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = folder.glob("venv/lib/python*/site-packages")

    def install(*arguments):
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile", "--retries", "1"]
        done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)
        if done.returncode and re.search(r"connection broken|Timeout|Connection|name resolution", done.stderr):
            pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"

    torch_line, grin_line = install_lines(README)
    assert torch_line == ["torch"]
    torch = importlib.metadata.distribution("torch")
    for name in {file.parts[0] for file in torch.files if file.parts[0] != ".."}:
        (site / name).symlink_to(torch.locate_file(name))
    assert grin_line[0].endswith("@ git+REPOSITORY")
    install(*[word.replace("git+REPOSITORY", wheel.as_uri()) for word in grin_line])
    yield python, install
    shutil.rmtree(folder)  # pytest would keep three of these, a GB each


@pytest.mark.slow
def test_the_readmes_lines_install_what_it_shows(fresh_environment, wheel, tiny_release, tmp_path):
    """The command, and the snippets of pages that need no more; then all others, with the extras that they name."""
    python, install = fresh_environment
    assert "convert" in run(python.with_name("grin-moe"), "--help", cwd=tmp_path, PYTHONPATH="")
    for needs_more in (False, True):
        pages = [page for page in DOCUMENTS if snippets(page) and bool(extras(page)) == needs_more]
        if needs_more:
            install(f"grin-moe[{','.join(sorted(set().union(*map(extras, pages))))}] @ {wheel.as_uri()}")
        found = [(page.name, snippet) for page in pages for snippet in snippets(page)]
        outcomes = run_snippets(
            [snippet for _, snippet in found], tmp_path / str(needs_more), tiny_release, python,
            PYTHONPATH="", HF_HUB_OFFLINE="1",
        )  # fmt: skip
        failed = [(name, output) for (name, _), (status, output) in zip(found, outcomes, strict=True) if status]
        assert not failed, "\n\n".join(f"{name}\n{output}" for name, output in failed)
