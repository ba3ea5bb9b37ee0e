"""Package metadata. Tool settings are in pyproject.toml, the tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

REQUIRES = [
    "accelerate>=1.15",  # device_map
    "torch>=2.11",
    "transformers>=5.17,<6",
    "safetensors>=0.8",
    "jinja2>=3.1",  # chat templates
    "matplotlib>=3.10",
    "rich>=14",
    "scipy>=1.16",  # clusters experts by what they are given
    "typer>=0.20",
]

TRAIN = [
    "datasets>=5.0",
    "peft>=0.21",
    "tensorboard>=2.20",
    "trl>=1.16",
]

QUANTIZED = ["bitsandbytes>=0.50"]

GGUF = ["gguf>=0.19"]

EVAL = [*TRAIN, "lm-eval>=0.4.13"]

SERVE = ["fastapi>=0.130", "openai>=2.0", "uvicorn>=0.40"]  # transformers' own server

DOCS = ["mkdocs-material>=9.7", "mkdocstrings-python>=2.0"]

DEV = [
    "hypothesis>=6.150",
    "mypy>=2.0",
    "pre-commit>=4.0",
    "pytest>=9.0",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "setuptools>=77.0.3",  # builds the wheel
]

UPSTREAM = ["httpx>=0.28", "parameterized>=0.9"]  # what the tests of transformers, peft and trl import

setup(
    name="grin-moe",
    version="0.1.0",
    description="GRIN-MoE as a native Transformers model, with SparseMixer-v2 routing",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require={
        "train": TRAIN,
        "quantized": QUANTIZED,
        "flash": ["flash-attn>=2.7"],
        "gguf": GGUF,
        "llama": [*GGUF, "llama-cpp-python>=0.3.36"],  # runs what was converted; compiled when it is installed
        "eval": EVAL,
        "serve": SERVE,
        "docs": DOCS,
        "upstream": [*TRAIN, *UPSTREAM],
        "dev": EVAL + QUANTIZED + GGUF + SERVE + DOCS + DEV,
    },
    # The explicit root makes an editable install follow the checkout, new top-level packages included.
    package_dir={"": "."},
    # Recipes are scripts to copy and edit, model cards a template: folders named here, which need no __init__.py.
    packages=[*find_packages(include=["modeling_grin*", "conversion*", "grin_moe_*"]), "recipes", "model_cards"],
    package_data={
        "modeling_grin": ["py.typed", "analysis/*.html"],
        "grin_moe_serving": ["site/*.py"],  # for PYTHONPATH, and no package
        "recipes": ["**/*.yaml"],
        "model_cards": ["*.md"],
    },
    entry_points={
        "console_scripts": ["grin-moe = grin_moe_cli:main"],
        "vllm.general_plugins": ["grin_moe = grin_moe_serving.vllm_plugin:register_with_vllm"],
    },
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
