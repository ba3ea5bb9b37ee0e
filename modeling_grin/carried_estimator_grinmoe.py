"""An estimator of a user's own beside the weights: what saving does with its function, and how it is found again."""

import importlib.util
import inspect
import os
from pathlib import Path

from transformers.utils import cached_file, logging

from .estimators_grinmoe import ROUTER_ESTIMATORS

logger = logging.get_logger(__name__)

ESTIMATOR_FILE = "router_estimator.py"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def save_estimator(name: str, folder: str | os.PathLike) -> None:
    """Copy the file in which `name` is defined to a checkpoint, if its record says so; otherwise say that it stays.

    Raises:
        ValueError: its record says `travels`, and the function is in no file.
    """
    record = ROUTER_ESTIMATORS.get(name)
    module = "" if record is None else getattr(record.function, "__module__", "")
    if record is not None and module.rpartition(".")[0] == __package__:
        return
    if record is None or not record.travels:
        where = f"{module}, which does not travel with it" if module else "no code of this process"
        logger.warning(
            f"The checkpoint in {os.fspath(folder)} has router_estimator={name!r}, which is defined in {where}. Who "
            "loads it must run that code first, or load with another router_estimator. With travels=True in "
            f"@router_estimator, saving copies its file as {ESTIMATOR_FILE}."
        )
        return
    source = inspect.getsourcefile(inspect.unwrap(record.function))
    if source is None or not Path(source).is_file():
        raise ValueError(f"router_estimator={name!r} has travels=True and must be defined in a file; got {source}")
    content = Path(source).read_bytes()  # before writing: it may be the same file
    (Path(folder) / ESTIMATOR_FILE).write_bytes(content)


def load_estimator(name: str, source: str | os.PathLike, **kwargs) -> None:
    """Run the file of an estimator that a checkpoint carries, unless `name` is registered already; the caller trusts
    `source`, a folder or Hub name. `kwargs` go to `from_pretrained`."""
    if name in ROUTER_ESTIMATORS:
        return
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    file = cached_file(source, ESTIMATOR_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if file is not None:
        spec = importlib.util.spec_from_file_location(Path(ESTIMATOR_FILE).stem, file)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
