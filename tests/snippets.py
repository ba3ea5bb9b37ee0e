"""The Python snippets of README and docs, and processes to run them in.

`python snippets.py FOLDERS` runs `snippet.py` of each folder, there, and prints its exit status; its output is in the
folder's `output.txt`. Each snippet has a process of its own, forked where torch and transformers have been
imported: one import serves all.
"""

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def snippets(document: Path) -> list[str]:
    """The Python blocks of a document that show how this package is used; those of upstream.md show other things."""
    return [] if document.name == "upstream.md" else blocks(document, "python")


def bash_lines(document: Path) -> list[str]:
    """The lines of a document's bash blocks, without comments."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|  +)#.*", "", line).strip() for line in lines) if line]


def run_snippets(
    snippets: list[str], folder: Path, release: Path, python: Path | str = sys.executable, **environment: str
) -> list[tuple[int, str]]:
    """Run snippets in the folders 0, 1, ... of `folder`; return the exit status and the output of each.

    A snippet runs as it stands, with a tiny model where it names the released one: `microsoft/GRIN-MoE` becomes
    `release`, and `GRIN-MoE` and `output/sft_tiny` in the snippet's folder are that model.
    """
    folders = [folder / str(number) for number in range(len(snippets))]
    for place, snippet in zip(folders, snippets, strict=True):
        shutil.copytree(release, place / "output" / "sft_tiny")
        (place / "GRIN-MoE").symlink_to(release)
        (place / "snippet.py").write_text(snippet.replace("microsoft/GRIN-MoE", str(release)), encoding="utf-8")
    done = subprocess.run(
        [python, "-P", __file__, *folders], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    outputs = [(place / "output.txt").read_text("utf-8") for place in folders]
    return list(zip(map(int, done.stdout.split()), outputs, strict=True))


def run_here(folder: str) -> None:
    """Run `snippet.py` of a folder in this process."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    runpy.run_path("snippet.py", run_name="__main__")


if __name__ == "__main__":
    import torch  # noqa: F401
    from transformers import Trainer, pipeline  # noqa: F401

    for folder in sys.argv[1:]:
        process = multiprocessing.get_context("fork").Process(target=run_here, args=(folder,))
        process.start()
        process.join()
        print(process.exitcode)
