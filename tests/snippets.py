"""The Python snippets of README and docs, and processes to run them in.

`python snippets.py` reads names of folders from standard input. It runs `snippet.py` of each, there, and answers with
its exit status; what it prints is then in the folder's `output.txt`. Each snippet has a process of its own, forked
where torch and transformers have been imported: one import serves all.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(document: Path) -> list[str]:
    """The Python blocks of a document that show how this package is used; those of upstream.md show other things."""
    if document.name == "upstream.md":
        return []
    return re.findall(r"^```python\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def bash_lines(document: Path) -> list[str]:
    """The lines of a document's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|  +)#.*", "", line).strip() for line in lines) if line]


class Interpreter:
    """Runs snippets with the packages of one environment.

    A snippet runs as it stands, with a tiny model where it names the released one: `microsoft/GRIN-MoE` becomes
    `release`, and `GRIN-MoE` and `output/sft_tiny` in the snippet's folder are that model.
    """

    def __init__(self, python: Path | str, release: Path, **environment: str):
        self.release = release
        self.process = subprocess.Popen(
            [python, "-P", __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip

    def run(self, snippet: str, folder: Path) -> tuple[int, str]:
        """Run a snippet in an empty folder; return its exit status and what it prints."""
        (folder / "GRIN-MoE").symlink_to(self.release)
        shutil.copytree(self.release, folder / "output" / "sft_tiny")
        (folder / "snippet.py").write_text(snippet.replace("microsoft/GRIN-MoE", str(self.release)), encoding="utf-8")
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline()
        return int(status or 1), (folder / "output.txt").read_text("utf-8") if status else "the imports failed"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def fork(folder: str) -> int:
    """Run `snippet.py` of a folder in a process of its own; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        runpy.run_path("snippet.py", run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import torch  # noqa: F401
    from transformers import Trainer, pipeline  # noqa: F401

    for line in sys.stdin:
        print(fork(line.rstrip("\n")), flush=True)
