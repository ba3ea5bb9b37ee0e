"""trl's trainer tests, with a tiny local model in place of every text model and a few lines in place of its data."""

import ast
import importlib
import importlib.util

import pytest
import sources
from datasets import Dataset, DatasetDict
from models import for_each_kind, hub  # noqa: F401 (hub: a fixture)

import modeling_grin  # noqa: F401

if importlib.util.find_spec("trl_tests") is None:
    pytest.skip("trl's tests need TRL_CHECKOUT: its source distribution has none", allow_module_level=True)

TRAINERS = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "rloo": "RLOO", "kto": "KTO", "reward": "Reward"}

LINES = [
    f"Line {i}: beautiful is better than ugly, and {word} is better than complicated."
    for i, word in enumerate(["simple", "explicit", "flat", "sparse", "readable"] * 4)
]


def columns(config: str) -> dict[str, list]:
    """The columns of a configuration of the data set that trl's tests load: `standard_` or `conversational_{type}`."""
    style, _, form = config.partition("_")

    def say(role, text):
        return [{"role": role, "content": text}] if style == "conversational" else text

    halves = [line.split(",") for line in LINES]
    prompts = [say("user", first) for first, _ in halves]
    chosen = [say("assistant", second) for _, second in halves]
    rejected = [say("assistant", second[::-1]) for _, second in halves]
    together = {"chosen": [a + b for a, b in zip(prompts, chosen, strict=True)]}
    together["rejected"] = [a + b for a, b in zip(prompts, rejected, strict=True)]
    return {
        "language_modeling": {"messages" if style == "conversational" else "text": together["chosen"]},
        "prompt_only": {"prompt": prompts},
        "prompt_completion": {"prompt": prompts, "completion": chosen},
        "preference": {"prompt": prompts, "chosen": chosen, "rejected": rejected},
        "implicit_prompt_preference": together,
        "unpaired_preference": {"prompt": prompts, "completion": chosen, "label": [True, False] * (len(LINES) // 2)},
    }[form]


def load_dataset(name, config=None, split=None, streaming=False):
    if name != "trl-internal-testing/zen":
        pytest.skip(f"needs the data set {name} from the Hub")
    whole = Dataset.from_dict(columns(config))
    parts = DatasetDict(train=whole.select(range(17)), test=whole.select(range(17, len(whole))))
    if split is None:
        return parts
    part, _, end = split.partition("[:")
    data = parts[part].select(range(int(end[:-1]))) if end else parts[part]
    return data.to_iterable_dataset() if streaming else data


def import_tests(module: str):
    """Import a module of trl's tests. A name that the installed trl lacks is one that says no to every question."""
    tree = ast.parse((sources.CACHE / "trl" / "trl_tests" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] == "trl":
            owner = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(owner, alias.name):
                    setattr(owner, alias.name, lambda *args, **kwargs: False)
    return importlib.import_module(f"trl_tests.{module}")


import_tests("testing_utils")
from trl_tests.conftest import force_use_cpu_without_accelerator  # noqa: E402, F401 (a fixture)

for module, name in TRAINERS.items():
    theirs = import_tests(f"test_{module}_trainer")
    theirs.load_dataset = load_dataset
    globals().update(for_each_kind(getattr(theirs, f"Test{name}Trainer")))
