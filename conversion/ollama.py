"""The Modelfile with which Ollama runs a GGUF file; LM Studio reads the file itself."""

from pathlib import Path

from modeling_grin import GrinMoeConfig, GrinMoeTokenizer
from modeling_grin.tokenization_grinmoe import CHAT_TEMPLATE

from .gguf_export import context_length

# The released chat format in Ollama's language, Go's text/template.
TEMPLATE = """{{- range .Messages }}<|{{ .Role }}|>
{{ .Content }}<|end|>
{{ end }}<|assistant|>
"""


def modelfile(gguf: Path, config: GrinMoeConfig, tokenizer: GrinMoeTokenizer | None) -> str:
    """Return a Modelfile that lies beside `gguf`: context, stop tokens, and the released chat format.

    Another chat template stays the GGUF file's own; a model without tokenizer has none.
    """
    lines = [f"FROM ./{gguf.name}", f"PARAMETER num_ctx {context_length(config)}"]
    if tokenizer is not None:
        lines += [f'PARAMETER stop "{tokenizer.decode(token_id)}"' for token_id in tokenizer.stop_token_ids]
        if tokenizer.chat_template == CHAT_TEMPLATE:
            lines.append(f'TEMPLATE """{TEMPLATE}"""')
    return "\n".join(lines) + "\n"
