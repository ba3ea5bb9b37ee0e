"""GRIN-MoE's tokenizer: the release's `tokenizer.json` as it stands, its chat format, and vocabularies of your own."""

from .compat_grinmoe import TRANSFORMERS  # noqa: F401 (first: it checks the version)

# isort: split
from collections.abc import Iterable, Sequence
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import TokenizersBackend

END_OF_TURN = "<|end|>"

# The added tokens of the release in the order of its ids (tokenizer.json, "added_tokens"). Those with `rstrip` take in
# the white space that follows them: "<|end|>\n" is one token.
SPECIAL_TOKENS = tuple(
    AddedToken(name, normalized=False, special=name != "</s>", rstrip=name not in ("<unk>", "<s>", "<|endoftext|>"))
    for name in (
        "<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>",
        "<|placeholder3|>", "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>",
        "<|user|>",
    )
)  # fmt: skip

# The released template, to recognise it: it renders the right text, but does not mark what the assistant said.
RELEASED_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# The same text, with the assistant's tokens marked. Blanks that open an answer stay outside the mark: the tokenizer
# gives them to `<|assistant|>`, and a mark that began on them would take in that token.
CHAT_TEMPLATE = r"""{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] is undefined or message['content'] is mapping or message['content'] is not iterable -%}
        {{- raise_exception('content of a message must be text, or a list of text parts.') -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part is not mapping or part['type'] != 'text' or part['text'] is not string -%}
                {{- raise_exception('Parts of a message must be {"type": "text", "text": ...}.') -}}
            {%- endif -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools or documents -%}
    {{- raise_exception('The chat format has no tools and no documents: write them into a message.') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['tool_calls'] -%}
        {{- raise_exception('The chat format has no tool calls: write them as text.') -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- set text = text_of(message) -%}
        {%- set answer = text.lstrip() -%}
        {%- set blanks = text[:text|length - answer|length] -%}
        {{- '<|assistant|>\n' + blanks -}}
        {%- generation -%}{{- answer + '<|end|>' -}}{%- endgeneration -%}
        {{- '\n' -}}
    {%- elif message['role'] in ('system', 'user') -%}
        {{- '<|' + message['role'] + '|>\n' + text_of(message) + '<|end|>\n' -}}
    {%- else -%}
        {{- raise_exception('Unknown role "' ~ message['role'] ~ '": a chat has system, user and assistant.') -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}"""


class GrinMoeTokenizer(TokenizersBackend):
    """The tokenizer of GRIN-MoE.

    Token ids come from `tokenizer.json`, whatever `tokenizer_config.json` says: the release names `LlamaTokenizer`
    there, for which transformers 5 would rebuild the tokenizer by other rules. `CHAT_TEMPLATE` replaces the released
    one, and no other: it renders the same text, marks the assistant's tokens for `return_assistant_tokens_mask` (TRL's
    `assistant_only_loss`), and joins lists of text parts. What the format lacks (tools, documents, other parts and
    roles) it refuses with `jinja2.TemplateError`.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    padding_side = "left"

    def __init__(
        self,
        chat_template: str | dict[str, str] | None = None,
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "<|endoftext|>",
        unk_token: str | AddedToken | None = "<unk>",
        pad_token: str | AddedToken | None = "<|endoftext|>",
        model_max_length: int = 4096,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model_max_length, int | float):
            raise ValueError(f"model_max_length={model_max_length!r} must be a number of tokens")
        super().__init__(
            chat_template=CHAT_TEMPLATE if chat_template in (None, RELEASED_CHAT_TEMPLATE) else chat_template,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            model_max_length=model_max_length,
            **kwargs,
        )

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Let `tokenizer.json` alone decide: no rebuilding, no second opinion from `added_tokens_decoder`."""
        if kwargs.get("tokenizer_file") is None:
            raise OSError(f"No tokenizer.json in {kwargs.get('name_or_path')}: GrinMoeTokenizer reads no other file.")
        kwargs.pop("added_tokens_decoder", None)
        return kwargs

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end an answer, for `generation_config.eos_token_id`: end of text, and end of turn."""
        ids = (self.backend_tokenizer.token_to_id(token) for token in (self.eos_token, END_OF_TURN) if token)
        return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        special_tokens: Sequence[AddedToken] = SPECIAL_TOKENS,
        **settings: Any,
    ) -> Self:
        """A tokenizer with a vocabulary learnt from `texts`, and the release's special tokens and chat format.

        Byte-level BPE: any text comes back from its ids unchanged, except white space that a special token takes in.
        The special tokens come first: `<unk>`, `<s>`, `</s>` and `<|endoftext|>` are 0 to 3, whatever `vocab_size`.

        Args:
            texts: texts, or batches of texts.
            vocab_size: the size to reach, special tokens included; a small corpus may support fewer tokens.
            special_tokens: the tokens with the ids 0, 1, 2, ...
            settings: arguments of the class, such as `chat_template`.

        Raises:
            ValueError: if `vocab_size` leaves no room for the special tokens and the 256 bytes.
        """
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        smallest = len(special_tokens) + len(byte_level.alphabet())
        if vocab_size < smallest:
            raise ValueError(f"vocab_size is {vocab_size}; special tokens and bytes alone take {smallest}.")

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = byte_level
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[token.content for token in special_tokens],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        tokenizer.add_tokens(list(special_tokens))  # again, for their flags: training makes each of them special
        return cls(tokenizer_object=tokenizer, **settings)

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
    ) -> Self:
        """As `train_from_iterator`, with this tokenizer's added tokens, then `new_special_tokens`, and its settings.

        transformers' own method would keep the release's byte fallback without the bytes to fall back to. `length` is
        ignored; a `special_tokens_map` is a ValueError.
        """
        if special_tokens_map:
            raise ValueError("special_tokens_map is not supported: the chat template relies on the tokens' names.")
        own = [token for _, token in sorted(self.added_tokens_decoder.items())]
        new = [
            token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False)
            for token in new_special_tokens or ()
        ]
        return self.train_from_iterator(
            text_iterator,
            vocab_size,
            [*own, *new],
            chat_template=self.chat_template,
            model_max_length=self.model_max_length,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
            extra_special_tokens=[*self.extra_special_tokens, *map(str, new)],
            **self.special_tokens_map,
        )


__all__ = ["GrinMoeTokenizer"]
