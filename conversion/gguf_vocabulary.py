"""Write a `tokenizer.json` as the vocabulary of a GGUF file.

llama.cpp does not run a `tokenizer.json`: it has its own tokenizers, for which the file has a name and data. Two of
them equal the tokenizers of this model family: Llama's SentencePiece BPE with byte fallback (the release), and
byte-level BPE that splits text as GPT-2 does (`GrinMoeTokenizer.train_from_iterator`). Two differences remain: white
space beyond ASCII stays text where an added token includes it, and GPT-2's rule may split new Unicode characters
differently.
"""

import json
import re
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf

from modeling_grin import GrinMoeTokenizer
from modeling_grin.tokenization_grinmoe import CHAT_TEMPLATE, END_OF_TURN, RELEASED_CHAT_TEMPLATE

from .tensors import ConversionError

SPACE = "▁"  # stands for a space in Llama's pieces
LLAMA_STEPS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
GENERATION = re.compile(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})")
UNUSED_SCORE = -1e9

# The file has no field for "includes the white space behind it" (`rstrip`). llama.cpp sets it for all added tokens
# except these if the model's name contains PHI3 (llama-vocab.cpp), and for none otherwise.
PHI3 = "phi3"
NEVER_RSTRIP = {"<unk>", "<s>", "<|endoftext|>"}


def is_llama(parts: dict[str, Any]) -> bool:
    """Whether `parts` (of tokenizer.json) are Llama's SentencePiece BPE, with a space before text."""
    steps = (parts["normalizer"] or {}).get("normalizers")
    model = parts["model"]
    byte_fallback = model["byte_fallback"] and set(BYTE_TOKENS) <= set(model["vocab"])
    return byte_fallback and steps == LLAMA_STEPS and parts["pre_tokenizer"] is None


def is_byte_level(parts: dict[str, Any]) -> bool:
    """Whether `parts` (of tokenizer.json) are byte-level BPE as GPT-2 has it."""
    splitter = parts["pre_tokenizer"] or {}
    same = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    return same and parts["normalizer"] is None and not parts["model"]["byte_fallback"]


def llama_scores(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[int, float]:
    """Return scores with which merging the pair with the best result (SentencePiece, llama.cpp) is merging by rank.

    The ranks must be an order of results, and every pair whose result is a piece must have one.
    """
    runs = [(piece, len(list(run))) for piece, run in groupby(left + right for left, right in merges)]
    pairs = set(map(tuple, merges))
    for piece in vocabulary:
        for split in range(1, len(piece)):
            pair = (piece[:split], piece[split:])
            if vocabulary.keys() >= {*pair} and pair not in pairs:
                raise ConversionError(
                    f"tokenizer.json has {piece!r} but no merge of {pair}, which llama.cpp would merge"
                )
    scores: dict[int, float] = {}
    rank = 0
    for piece, length in runs:
        if vocabulary[piece] in scores:
            raise ConversionError(f"the merges of tokenizer.json come back to {piece!r}, which no scores express")
        scores[vocabulary[piece]] = -float(rank)
        rank += length
    return scores


def token_types(tokenizer: GrinMoeTokenizer, tokens: list[str | None]) -> list[gguf.TokenType]:
    types = [gguf.TokenType.BYTE if token in BYTE_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    for token_id, added in tokenizer.added_tokens_decoder.items():
        types[token_id] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    return [gguf.TokenType.UNUSED if token is None else kind for token, kind in zip(tokens, types, strict=True)]


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> tuple[str, list[str]]:
    """Add the folder's tokenizer, its special tokens and its chat template to a file's metadata.

    Ids without a token, up to `vocab_size`, are filled with unused tokens. A folder without tokenizer.json gives a
    file without vocabulary, which llama.cpp evaluates on token ids.

    Returns:
        A text that the model's name must contain for llama.cpp to treat added tokens right, and notes for the report.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("no_vocab")
        return "", [f"no tokenizer.json in {folder}: the file has no vocabulary"]
    try:
        tokenizer = GrinMoeTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises nothing more special
        raise ConversionError(f"{path} cannot be read: {error}") from error
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens: list[str | None] = [None] * vocab_size
    for token, token_id in tokenizer.get_vocab().items():
        if token_id >= vocab_size:
            raise ConversionError(
                f"{path}: the token {token!r} has the id {token_id}, and the model only vocab_size={vocab_size} "
                "embeddings: resize them, or, if tokenizer.json lacks it, let the bos, eos, unk or pad token in "
                "tokenizer_config.json be one that is there"
            )
        tokens[token_id] = token

    model = parts["model"]
    refused = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model[option] for option in refused):
        raise ConversionError(f"{path}: llama.cpp has no tokenizer like this {model['type']}")
    if is_llama(parts):
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(True)
        scores = llama_scores(model["vocab"], model["merges"])
        writer.add_token_scores([scores.get(token_id, UNUSED_SCORE) for token_id in range(vocab_size)])
    elif is_byte_level(parts):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([f"{left} {right}" for left, right in model["merges"]])
    else:
        raise ConversionError(f"{path}: llama.cpp has no tokenizer like this BPE; it has Llama's and GPT-2's")
    writer.add_token_list([f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)])
    writer.add_token_types(token_types(tokenizer, tokens))
    add_special_tokens(writer, tokenizer)
    return fitting_name(tokenizer.added_tokens_decoder.values())


def add_special_tokens(writer: gguf.GGUFWriter, tokenizer: GrinMoeTokenizer) -> None:
    if tokenizer.encode("a") != tokenizer.encode("a", add_special_tokens=False):
        raise ConversionError("tokenizer.json adds tokens to every text (post_processor); only plain ids are exported")
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    ids = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_eot_token_id: tokenizer.backend_tokenizer.token_to_id(END_OF_TURN),
    }
    for add, token_id in ids.items():
        if token_id is not None:
            add(token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": without_marks(text)} for name, text in template.items()])
    else:  # the two render the same text
        writer.add_chat_template(RELEASED_CHAT_TEMPLATE if template == CHAT_TEMPLATE else without_marks(template))


def without_marks(template: str) -> str:
    """Remove `{% generation %}` from a chat template: only transformers knows this tag."""
    return GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)


def fitting_name(added: Collection[Any]) -> tuple[str, list[str]]:
    """Return what `add_vocabulary` returns, for the `AddedToken`s."""

    def misread(phi3: bool) -> list[str]:
        """Return the tokens beside which llama.cpp treats white space differently."""
        return [
            str(token)
            for token in added
            if token.rstrip != (phi3 and str(token) not in NEVER_RSTRIP) or token.lstrip or token.single_word
        ]

    name = min(("", PHI3), key=lambda name: len(misread(bool(name))))
    wrong = misread(bool(name))
    return name, [f"llama.cpp treats white space beside these tokens differently: {', '.join(wrong)}"] if wrong else []
