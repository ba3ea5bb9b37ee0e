"""Python imports this file first in every process of `grin-moe with`; transformers learns `grinmoe` when it is loaded.

The folder is on PYTHONPATH for that command alone. A `sitecustomize` of the environment itself runs as ever.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
AUTO = "transformers.models.auto.configuration_auto"


class RegisterAfterImport(MetaPathFinder):
    """Finds `AUTO` once, and registers with it as soon as it has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            from grin_moe_serving.lazy import register

            register(module)

        spec.loader.exec_module = run_and_register
        return spec


sys.meta_path.insert(0, RegisterAfterImport())
others = [entry for entry in sys.path if Path(entry).resolve() != HERE]
hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
if hidden is not None and hidden.loader is not None:
    hidden.loader.exec_module(importlib.util.module_from_spec(hidden))
