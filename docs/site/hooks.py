"""Add pages to the site that are not files of docs/: the README as front page, and a reference from docstrings.

People also read the documents in the repository, so their links are relative to it. Here these links lead to the
site's pages, or to a module's reference.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCUMENTS = {  # files of the repository outside docs/, and their pages
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
}
REFERENCE = {  # page: what it says, and the modules it shows
    "modeling": ("Model", "The config, the model and its heads.", [
        "modeling_grin.configuration_grinmoe", "modeling_grin.modeling_grinmoe",
    ]),
    "routing": ("Routing", "Which experts, with what weight, and the router's gradient.", [
        "modeling_grin.routing_grinmoe", "modeling_grin.noise_grinmoe",
    ]),
    "balance": ("Load balance", "The load-balance loss, and the optimizer step it belongs to.", [
        "modeling_grin.balance_grinmoe", "modeling_grin.training_grinmoe",
    ]),
    "tokenization": ("Tokenizer", "Text to ids, and the chat format.", ["modeling_grin.tokenization_grinmoe"]),
    "experts": ("Experts and loss", "What computes the experts, and the loss of the language model.", [
        "modeling_grin.experts_grinmoe", "modeling_grin.linear_experts_grinmoe", "modeling_grin.kernels.cpu_experts",
        "modeling_grin.kernels.chunked_loss",
    ]),
    "checkpoints": ("Checkpoints", "Released tensors and the model's parameters.", [
        "modeling_grin.layout_grinmoe", "modeling_grin.loading_grinmoe",
    ]),
    "training": ("Training", "The trainers, their checkpoints, the routing callback, LoRA and pipelines.", [
        "modeling_grin.training.trainer", "modeling_grin.training.trl_trainers", "modeling_grin.training.callback",
        "modeling_grin.training.checkpoints", "modeling_grin.training.sharded", "modeling_grin.lora",
        "modeling_grin.training.resuming", "modeling_grin.training.trl_rules", "modeling_grin.training.pipeline",
        "modeling_grin.training.pipeline_trainer",
        "modeling_grin.training.data_checks", "modeling_grin.training.arguments", "modeling_grin.training.run",
    ]),
    "analysis": ("Analysis", "Studies of routing and of router gradients.", [
        "modeling_grin.analysis.routing", "modeling_grin.analysis.specialization", "modeling_grin.data",
        "modeling_grin.analysis.figures", "modeling_grin.analysis.report", "modeling_grin.analysis.gradients",
    ]),
    "planning": ("Planning", "What training on many devices costs.", [
        "modeling_grin.planning.plan", "modeling_grin.planning.setting", "modeling_grin.planning.memory",
        "modeling_grin.planning.time", "modeling_grin.planning.parameters",
    ]),
    "conversion": ("Conversion", "Checkpoints of every form, read and written.", [
        "conversion.conversion", "conversion.inspection", "conversion.summary", "conversion.checkpoint",
        "conversion.forms", "conversion.gguf_export", "conversion.adapters", "conversion.experts",
    ]),
    "publishing": ("Publishing", "Model cards, and the way to the Hub.", [
        "modeling_grin.publishing.card", "modeling_grin.publishing.record", "modeling_grin.publishing.push",
    ]),
}  # fmt: skip
PAGE_OF = DOCUMENTS | {
    f"{module.replace('.', '/')}.py": f"reference/{page}.md"
    for page, (_, _, modules) in REFERENCE.items()
    for module in modules
}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)([^)]*)\)")  # text, target, anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site's files."""
    for document, page in DOCUMENTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    for page, (title, about, modules) in REFERENCE.items():
        shown = "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"reference/{page}.md", content=f"# {title}\n\n{about}\n\n{shown}"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the repository into links to the site's pages, or into plain text without a page."""
    place = next((document for document, name in DOCUMENTS.items() if name == page.file.src_uri), None)
    folder = posixpath.dirname(place) if place else "docs"

    def lead(match: re.Match) -> str:
        text, target, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(folder, target))
        if target not in PAGE_OF and not target.startswith("docs/"):
            return text
        target = PAGE_OF.get(target, target.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(lead, markdown)
