"""The Modelfile with which Ollama runs a GGUF file; LM Studio reads the file itself."""

from pathlib import Path

from modeling_grin import GrinMoeTokenizer
from modeling_grin.files import write_whole
from modeling_grin.tokenization_grinmoe import CHAT_TEMPLATE

from .checkpoint import Checkpoint
from .gguf_export import context_length

# The released chat format in Ollama's language, Go's text/template.
TEMPLATE = """{{- range .Messages }}<|{{ .Role }}|>
{{ .Content }}<|end|>
{{ end }}<|assistant|>
"""


def write_modelfile(checkpoint: Checkpoint, gguf: Path) -> list[str]:
    """Write context, stop tokens and the released chat format beside a GGUF file, unless there is a Modelfile.

    Another chat template stays the GGUF file's own; a model without tokenizer has none. Returns notes for the report.
    """
    path = gguf.with_suffix(".Modelfile")
    if path.exists():
        return []
    lines = [f"FROM ./{gguf.name}", f"PARAMETER num_ctx {context_length(checkpoint.config)}"]
    if (checkpoint.path / "tokenizer.json").is_file():
        tokenizer = GrinMoeTokenizer.from_pretrained(checkpoint.path)
        lines += [f'PARAMETER stop "{tokenizer.decode(token_id)}"' for token_id in tokenizer.stop_token_ids]
        if tokenizer.chat_template == CHAT_TEMPLATE:
            lines.append(f'TEMPLATE """{TEMPLATE}"""')
    write_whole(path, "\n".join(lines) + "\n")
    return [f"for Ollama: ollama create grin -f {path.name}"]
