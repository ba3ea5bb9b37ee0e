"""Configuration of GRIN-MoE: the fields of the released `config.json`, checked when they are read."""

from .compat_grinmoe import CACHES_READ_TEXT_CONFIG  # first: it checks the version

# isort: split
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PhimoeConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .carried_estimator_grinmoe import save_estimator
from .estimators_grinmoe import ROUTER_ESTIMATORS

MAX_INT = 2**63 - 1  # of torch
POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip
NOT_NEGATIVE = (
    "router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate",
    "initializer_range",
)  # fmt: skip
SHARES = ("input_jitter_noise", "attention_dropout", "expert_dropout")
NESTED_CONFIGS = ("decoder", "generator", "text_config", "text_encoder")  # those that `get_text_config` looks for


class VisibleWindowConfig:
    """A config as transformers' masks and caches read it: their `sliding_window` includes a query's own key.

    The released `sliding_window` W lets a query see itself and the W keys before it (FlashAttention's
    `window_size=(W, ·)`), so W + 1 keys in all; transformers 5 means W keys, the query's own included.
    """

    def __init__(self, config: PreTrainedConfig):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    @property
    def sliding_window(self) -> int | None:
        window = self._config.sliding_window
        return None if window is None else window + 1


def read_phimoe(values: dict[str, Any]) -> dict[str, Any]:
    """Translate a `phimoe` config.json: fill in Phimoe's defaults, and give its window the released meaning.

    The code that a config names decides what its window means. The siblings' remote code (`PhiMoEForCausalLM`) sees
    `sliding_window` keys before the query's own; so does a config that names no code. transformers' classes
    (`PhimoeForCausalLM`, ...) include the query's own key, and `save_pretrained` writes their names.

    Raises:
        ValueError: a window in transformers' meaning that holds the query's own key alone.
    """
    defaults = {field.name: field.default for field in fields(PhimoeConfig) if field.default is not MISSING}
    values = {**defaults, "rope_theta": PhimoeConfig.default_theta, **values}
    architectures, window = values["architectures"], values["sliding_window"]
    stock = isinstance(architectures, list) and any(str(name).startswith("Phimoe") for name in architectures)
    if stock and isinstance(window, int):
        if window < 2:
            raise ValueError(
                f"sliding_window={window} of {architectures} counts a query's own key; it must be at least 2 or None"
            )
        values["sliding_window"] = window - 1
    return values


def is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0 that a tensor can hold."""
    return isinstance(value, int | float) and 0 < value <= (MAX_INT if isinstance(value, int) else sys.float_info.max)


@strict
class GrinMoeConfig(PreTrainedConfig):
    r"""Configuration of a GRIN mixture-of-experts model; the defaults are `microsoft/GRIN-MoE` (16x3.8B, top-2).

    Field names are those of the released `config.json`; `head_dim`, `expert_dropout`, `router_estimator`,
    `router_sampling`, `freeze_router`, `moe_output_scale`, `router_z_loss_coef` and `router_bias_update_rate` are new.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size:
            the usual sizes; `intermediate_size` is one expert's.
        head_dim: size of an attention head; `hidden_size // num_attention_heads` by default.
        num_local_experts: experts per layer (also `num_experts`).
        num_experts_per_tok: experts a token is sent to, top-k.
        rms_norm_eps: epsilon of the norms, which are LayerNorms whatever the name says.
        rope_parameters: RoPE settings; `rope_theta` and `rope_scaling` of older files are read into it. Those of
            LongRoPE (`rope_type="longrope"`, Phi-3.5-MoE) may have the `short_mscale` and `long_mscale` of the
            release, which go before transformers' own attention factor.
        sliding_window: W as released: a query sees itself and W keys before it, W + 1 in all. None: all of them.
        attention_bias, lm_head_bias: whether the attention projections and the head have biases.
        attention_dropout: dropout of the attention probabilities.
        expert_dropout: dropout of the experts' intermediate activations (section 4.1, after Switch Transformer).
        hidden_dropout: part of the released file; only 0 exists.
        router_jitter_noise: r of Equation 2, width of the keep set of MaskedSoftmax. Part of inference too.
        input_jitter_noise: in training, the MoE input is multiplied by U(1 - e, 1 + e).
        router_estimator: how the router's gradient is estimated, a key of `routing_grinmoe.ROUTER_ESTIMATORS`;
            inference follows its rule as well. A name that nobody registered fails at the first routing.
        router_sampling: whether training samples experts. If not, it takes the best ones, as inference does.
        freeze_router: build and load the routers' weights with `requires_grad=False`. (In a LoRA configuration, leave
            `gate` out of the targets as well.)
        moe_output_scale: whether each mixture's output has a learnt scale per channel, omega of SparseMixer.
        router_aux_loss_coef: alpha of the load-balance loss (section 3.3), which acts in every backward pass of a
            model in training: attached by autograd inside, it is not part of the loss that the model returns.
        router_z_loss_coef: coefficient of the router z-loss, the mean of logsumexp(z)^2 over tokens and layers, which
            acts beside the balance loss and is not in the paper.
        router_bias_update_rate: u of loss-free balancing (arXiv 2408.15664): above 0, each expert has a bias that
            takes part in its selection, and that each optimizer step moves by u towards a balanced load.
        output_router_logits: whether forward passes return `router_logits` and `aux_loss`.

    Raises:
        ValueError: impossible sizes or values (heads not divisible, top-k above the number of experts,
            negative jitter, ...), named with field and value; or a file of another model type.
    """

    model_type = "grinmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits", "aux_loss"]
    attribute_map = {"num_experts": "num_local_experts"}
    default_theta = 10000.0
    ignore_keys_at_rope_validation = {"short_mscale", "long_mscale"}  # Phi-3.5-MoE's own; `_check_rope` checks them
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.block_sparse_moe.experts.gate_up_proj": "packed_colwise",
        "layers.*.block_sparse_moe.experts.down_proj": "rowwise",
        "layers.*.block_sparse_moe.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 6400
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    sliding_window: int | None = 2047
    attention_bias: bool = True
    lm_head_bias: bool = True
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    expert_dropout: float | int = 0.0
    num_local_experts: int = 16
    num_experts_per_tok: int = 2
    router_jitter_noise: float | int = 0.01
    input_jitter_noise: float | int = 0.01
    router_estimator: str = "sparsemixer_v2"
    router_sampling: bool = True
    freeze_router: bool = False
    moe_output_scale: bool = False
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    router_bias_update_rate: float | int = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        # The release's remote code (GRINMoE...) no longer imports; this class replaces it, in saved configs as well.
        # Our own `auto_map` stays if `save_pretrained` also writes the code.
        auto_map = kwargs.pop("auto_map", None) or {}
        ours = {auto: name for auto, name in auto_map.items() if "GrinMoe" in str(name)}
        kwargs["auto_map"] = ours if self.is_remote_code() else {}  # TRL reads it from classes that it does not know
        # transformers would set this alias only after the values have been checked.
        self.num_local_experts = kwargs.pop("num_experts", self.num_local_experts)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_values()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for field in NESTED_CONFIGS:  # transformers would take it for this config
            if kwargs.get(field) is not None:
                raise ValueError(f"{type(self).__name__}: {field} is of composite models, and this is none: remove it")
        super().__post_init__(**kwargs)
        self._check_rope()

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {problem}")

    def _check_values(self) -> None:
        """Raise ValueError for the first field whose value no model can be built from.

        `@strict`'s `validate_` methods would run after the derived fields are set, and raise another error class.
        """
        for field in POSITIVE:
            self._require(getattr(self, field) >= 1, f"{field}={getattr(self, field)} must be at least 1")
        width, heads, key_value_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads or 1
        top_k, names = self.num_experts_per_tok, self.architectures
        # An estimator that nobody registered yet fails at the first routing: here, an override would come too late.
        estimator = ROUTER_ESTIMATORS.get(self.router_estimator)
        most = (estimator and estimator.max_top_k) or top_k
        is_list, window = isinstance(names, list), self.sliding_window
        for field, is_right, reason in (
            ("hidden_size", self.head_dim or width % heads == 0, f"must be divisible by num_attention_heads={heads}"),
            ("hidden_size", self.head_dim or width // heads % 2 == 0, f"/ {heads} heads must be even for RoPE"),
            ("head_dim", self.head_dim is None or (self.head_dim >= 2 and self.head_dim % 2 == 0), "must be even"),
            ("num_attention_heads", heads % key_value_heads == 0,
             f"must be divisible by num_key_value_heads={key_value_heads}"),
            ("num_experts_per_tok", top_k <= self.num_local_experts,
             f"must not exceed num_local_experts={self.num_local_experts}"),
            ("num_experts_per_tok", top_k <= most,
             f"must be at most {most}: router_estimator={self.router_estimator!r} is not defined for more"),
            ("hidden_act", self.hidden_act in ACT2FN, f"is unknown; use one of {sorted(ACT2FN)}"),
            ("sliding_window", window is None or window >= 1, "must be at least 1 or None"),
            ("rms_norm_eps", self.rms_norm_eps > 0, "must be above 0"),
            *((field, getattr(self, field) >= 0, "must not be negative") for field in NOT_NEGATIVE),
            *((field, 0 <= getattr(self, field) < 1, "must be in [0, 1)") for field in SHARES),
            ("architectures", names is None or (is_list and all(isinstance(name, str) for name in names)),
             "must be a list of class names"),
            ("output_hidden_states", isinstance(self.output_hidden_states, bool | None), "must be true or false"),
            ("hidden_dropout", self.hidden_dropout == 0, "is not part of the model; only 0 is supported"),
        ):  # fmt: skip
            self._require(bool(is_right), f"{field}={getattr(self, field)!r} {reason}")

    def _check_rope(self) -> None:
        """Raise ValueError for RoPE settings (read by transformers, so after it) that the model does not have."""
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        rope_type, theta = rope.get("rope_type", "default"), rope.get("rope_theta", self.default_theta)
        known = sorted({"default", *ROPE_INIT_FUNCTIONS})
        self._require(rope_type in known, f"rope_parameters: rope_type={rope_type!r} is unknown; use one of {known}")
        self._require(rope.get("partial_rotary_factor", 1) == 1, "rope_parameters: partial_rotary_factor must be 1")
        self._require(is_positive(theta), f"rope_parameters: rope_theta={theta!r} must be a number above 0")
        if rope_type == "longrope":
            self._check_longrope()
        elif rope_type != "default":
            try:
                self.validate_rope()  # transformers does so later, and a missing field is a KeyError there
            except (KeyError, TypeError, ArithmeticError) as error:
                raise ValueError(f"{type(self).__name__}: rope_parameters: {error.args[0]}") from error

    def _check_longrope(self) -> None:
        """Raise ValueError for LongRoPE settings that are incomplete, or of the wrong size or kind."""
        self.standardize_rope_params()  # an `original_max_position_embeddings` beside `rope_scaling` moves into it
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        size, its = (self.head_dim or 0) // 2, "rope_parameters: longrope's"
        for field in ("short_factor", "long_factor"):
            factors: Any = rope.get(field)
            is_list = isinstance(factors, list) and all(map(is_positive, factors))
            self._require(is_list, f"{its} {field} must be a list of numbers above 0")
            needed = f"has {len(factors)} numbers and must have {size}, half of head_dim={2 * size}"
            self._require(len(factors) == size, f"{its} {field} {needed}")
        length = rope["original_max_position_embeddings"]
        is_length = isinstance(length, int) and length >= 2
        self._require(is_length, f"{its} original_max_position_embeddings={length!r} must be at least 2")
        scales = {name: rope.get(name) for name in ("short_mscale", "long_mscale", "factor", "attention_factor")}
        for name, value in scales.items():
            self._require(value is None or is_positive(value), f"{its} {name}={value!r} must be a number above 0")
        is_pair = (scales["short_mscale"] is None) == (scales["long_mscale"] is None)
        self._require(is_pair, "rope_parameters: longrope has only one of short_mscale and long_mscale; give both")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers; an estimator of a user's own goes along, or a warning says that it does not."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        save_estimator(self.router_estimator, save_directory)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without an `auto_map` that is empty."""
        values = super().to_dict()
        if not values["auto_map"]:
            del values["auto_map"]
        return values

    @property
    def per_layer_config(self) -> Sequence[VisibleWindowConfig]:
        """Each layer's config as transformers' caches ask for it; the layers are alike, and this cannot be set."""
        return [VisibleWindowConfig(self)] * self.num_hidden_layers

    def get_text_config(self, decoder=None, encoder=None):
        """As in transformers; caches ask with `decoder=True`."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        return VisibleWindowConfig(config) if decoder and CACHES_READ_TEXT_CONFIG else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, but another model type is an error instead of a warning.

        `phimoe`, the sibling releases' type, has the same architecture and fields.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "phimoe":
            config_dict = read_phimoe(config_dict)
        if model_type not in (cls.model_type, "grinmoe", "phimoe"):
            raise ValueError(
                f"The config says model_type={model_type!r}; {cls.__name__} reads 'grinmoe' and 'phimoe'. "
                "Load this checkpoint with the Auto classes or with its own model class."
            )
        # transformers would keep the file's type, and look up the experts' layout under it.
        loaded = super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)
        # Overrides like `from_pretrained(path, num_experts_per_tok=4)` are set after the first check.
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._check_values()
        config._check_rope()
        return loaded


__all__ = ["GrinMoeConfig"]
