"""Finds upstream's tests: sources of the installed versions from the package registry, the rest in checkouts.

`.upstream/` of the repository keeps the sources; git ignores it. TRANSFORMERS_CHECKOUT and TRL_CHECKOUT name
checkouts, best of the installed versions, for what the source distributions lack: a part of transformers' tests and
all of trl's.
`stand_ins/` has the least that transformers' other tests need without a checkout.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".upstream"
STAND_INS = Path(__file__).parent / "stand_ins"


def download(project: str, package: str) -> Path:
    """The unpacked source distribution of the installed `project`, its tests in the folder `package`."""
    name = f"{project}-{version(project)}"
    if not (CACHE / name).exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", folder]
            subprocess.run([*pip, "--no-binary", project, f"{project}=={version(project)}"], check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            unpacked = Path(folder) / name
            unpacked.joinpath("tests").rename(unpacked / package)
            unpacked.joinpath(package, "__init__.py").touch()  # transformers' ConfigTester imports it by its path
            unpacked.rename(CACHE / name)
    return CACHE / name


def find_checkout(project: str) -> Path | None:
    """The checkout of `project` that the environment names."""
    variable = f"{project.upper()}_CHECKOUT"
    if variable not in os.environ:
        return None
    folder = Path(os.environ[variable]).resolve()
    if not (folder / "tests").is_dir():
        raise ValueError(f"{variable} must name a checkout of {project}, with its tests/; got {folder}")
    return folder


def link_missing(folder: Path, other: Path) -> None:
    """Link what `folder` lacks of `other`'s files and folders."""
    for entry in other.iterdir():
        if not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)


def prepare() -> None:
    """Make upstream's tests importable, here and in processes that start here: as tests, peft_tests and trl_tests."""
    transformers, peft, trl = download("transformers", "tests"), download("peft", "peft_tests"), CACHE / "trl"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the links
        trl.mkdir(exist_ok=True)
        for link in [*transformers.iterdir(), *transformers.joinpath("tests").iterdir(), *trl.iterdir()]:
            if link.is_symlink():  # of an earlier run, maybe to another checkout
                link.unlink()
        if checkout := find_checkout("transformers"):
            link_missing(transformers, checkout)
            link_missing(transformers / "tests", checkout / "tests")
        link_missing(transformers / "tests", STAND_INS)
        if checkout := find_checkout("trl"):
            trl.joinpath("trl_tests").symlink_to(checkout / "tests")
    sys.path[:0] = map(str, (transformers, peft, trl))
