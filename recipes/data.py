"""Write real data for the recipes, from the source code of Python's own standard library: no download.

    python recipes/data.py data

writes data/pretrain.jsonl (`text`: modules), data/sft.jsonl (`messages`: a docstring asked, its function answered),
data/grpo.jsonl (`prompt` and `answer`: the same) and data/dpo.jsonl (`prompt`, `chosen`, `rejected`: the function, and
the same with the lines of its body in disorder).
"""

import ast
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

console = Console()


class Function(NamedTuple):
    """A documented function: its source in two parts, the body without the docstring, and its docstring."""

    signature: str
    body: str
    docstring: str


def read_modules() -> Iterator[str]:
    """Yield the source of the standard library's modules, without its tests and installed packages."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if not {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(path.relative_to(folder).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def find_functions(source: str) -> Iterator[Function]:
    """Yield a module's documented functions and methods that have a body beside the docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes, in lib2to3 and others
        tree = ast.parse(source)
    lines = source.split("\n")  # as ast counts lines: form feeds do not end one
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)) and len(node.body) > 1:
            start, end = node.body[0].lineno - 1, node.body[0].end_lineno  # the docstring's lines
            signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : start]))
            body = textwrap.indent(textwrap.dedent("\n".join(lines[end : node.end_lineno])), " " * 4)
            yield Function(signature, body, docstring)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    console.print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.1f} MB")


def main(
    output_dir: Annotated[Path, typer.Argument(help="folder for the files")],
    max_rows: Annotated[int, typer.Option(min=2, help="largest number of rows per file")] = 2000,
    max_characters: Annotated[
        int, typer.Option(min=1, help="skip functions that are longer, docstring included")
    ] = 800,
    seed: Annotated[int, typer.Option(help="seed of the choice of rows")] = 0,
) -> None:
    """Write pretrain.jsonl, sft.jsonl, grpo.jsonl and dpo.jsonl, made from Python's standard library.

    Example: python recipes/data.py data --max-rows 500
    """
    generator = random.Random(seed)
    modules = list(read_modules())
    generator.shuffle(modules)
    found = chain.from_iterable(map(find_functions, modules))
    functions = list(islice((f for f in found if len("".join(f)) <= max_characters), max_rows))
    generator.shuffle(functions)

    def say(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    def ask(function: Function) -> list[dict]:
        return say("user", f"Write the Python function\n{function.signature}\n\n{function.docstring}")

    def answer(function: Function, body: str) -> list[dict]:
        return say("assistant", f"{function.signature}\n{body}")

    output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(output_dir / "pretrain.jsonl", [{"text": source} for source in modules[:max_rows]])
    write_rows(output_dir / "sft.jsonl", [{"messages": ask(f) + answer(f, f.body)} for f in functions])
    answers = [{"prompt": ask(f), "answer": f"{f.signature}\n{f.body}"} for f in functions]
    write_rows(output_dir / "grpo.jsonl", answers)
    pairs = []
    for f in functions:
        lines = f.body.split("\n")
        disorder = "\n".join(generator.sample(lines, len(lines)))
        if disorder != f.body:  # a body of one line stays as it is
            pairs.append({"prompt": ask(f), "chosen": answer(f, f.body), "rejected": answer(f, disorder)})
    write_rows(output_dir / "dpo.jsonl", pairs)


if __name__ == "__main__":
    typer.run(main)
