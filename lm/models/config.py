"""The settings of a Transformer, and what they say about each other."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from lm.errors import check
from lm.models.layers import GATED
from lm.models.lora import LoraConfig

Float = Literal["float32", "bfloat16"]


_NOT_NEGATIVE = (
    "attention_softcap",
    "logit_softcap",
    "init_std",
    "encoder_layers",
    "token_types",
    "n_classes",
    "adapter_dim",
    "prompt_len",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and parts of a Transformer."""

    vocab_size: int | None = None
    """Rows of the embedding; None = the tokenizer's size, rounded up to a multiple of `vocab_multiple`."""
    vocab_multiple: int = 128
    """Rounding of a vocabulary size taken from the tokenizer; matrix units want multiples of 128."""
    d_model: int = 384
    """Width of the residual stream."""
    n_layers: int = 6
    """Number of blocks; of the decoder, where there is an encoder."""
    encoder_layers: int = 0
    """Blocks of an encoder whose output the decoder attends to; 0 = no encoder."""
    mask: Literal["causal", "bidirectional", "prefix"] = "causal"
    """What a token sees: those before it, all of its segment, or those before it and, within a prefix, all of that."""
    n_heads: int = 6
    """Attention heads."""
    n_kv_heads: int | None = None
    """Key/value heads; None = n_heads, fewer = grouped-query, 1 = multi-query attention."""
    head_dim: int | None = None
    """Width of a head; None = d_model / n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward block; None = 4 d_model, or 8/3 d_model rounded up to 128 for gated activations."""
    max_len: int = 1024
    """Longest sequence; the rows of a learned position table."""
    positions: Literal["learned", "sinusoidal", "rope", "relative", "none"] = "learned"
    """Position encoding; relative = T5's, a bias on attention scores by distance."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Longer rotary wavelengths, for texts longer than those trained on first: linear = all rope_factor times as long;
    llama3 = only those beyond rope_original_len / rope_low_frequency, with a passage from there to
    rope_original_len / rope_high_frequency (LLaMA 3.1)."""
    rope_factor: float = 8.0
    """With rope_scaling: how many times as long."""
    rope_low_frequency: float = 1.0
    """With rope_scaling llama3: see there."""
    rope_high_frequency: float = 4.0
    """With rope_scaling llama3: see there."""
    rope_original_len: int = 8192
    """With rope_scaling llama3: the length trained on first."""
    relative_buckets: int = 32
    """Distances that relative positions tell apart; beyond a half of them, several share one."""
    relative_distance: int = 128
    """From this distance on, relative positions are one and the same."""
    token_types: int = 0
    """Rows of a table of token types, added to the embeddings (BERT: first or second text); 0 = none."""
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(d_model)."""
    embedding_norm: bool = False
    """A norm after the embeddings, before their dropout."""
    share_embeddings: bool = True
    """Source and target of an encoder-decoder read one table."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of norm."""
    norm_place: Literal["pre", "post"] = "pre"
    """Norm before each block's input (and once at the end), or after each residual sum."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "swiglu", "geglu", "geglu_tanh"] = (
        "gelu_tanh"
    )
    """Of the feed-forward block; swiglu, geglu and geglu_tanh add a gate projection."""
    use_bias: bool = True
    """Biases in projections and layer norms."""
    qkv_bias: bool = False
    """Biases on queries, keys and values also where use_bias is off, as in Qwen2."""
    tie_embeddings: bool = True
    """The output head is the embedding table."""
    scale_logits: bool = False
    """Multiply what the output head reads by d_model**-0.5, as T5 does with a tied head."""
    head_transform: bool = False
    """A projection, the activation and a layer norm before the output head, as in BERT."""
    head_bias: bool = False
    """A bias on the logits."""
    n_classes: int = 0
    """Classes of a classifier on the pooled sequence (2 for next-sentence prediction); 0 = no classifier."""
    classifier_bias: bool = True
    """A bias on the classes' scores; the classifiers that transformers puts on decoders have none."""
    pooling: Literal["first", "last", "mean"] = "first"
    """What stands for a sequence: its first or last token, or the mean of all."""
    pooler: bool = False
    """A projection and tanh on the pooled vector, as in BERT."""
    span_head: bool = False
    """Two scores for each token: an answer starts here, an answer ends here."""
    qk_norm: bool = False
    """RMS norm on queries and keys, per head."""
    scale_attention: bool = True
    """Divide attention scores by the root of the head width."""
    attention_softcap: float = 0.0
    """Bound on attention scores, c tanh(s / c); 0 = off."""
    logit_softcap: float = 0.0
    """Bound on output logits; 0 = off."""
    window: int | None = None
    """Sliding window: tokens see themselves and the window - 1 before them; None = all."""
    embedding_dropout: float = 0.0
    """Dropout rate after the embeddings and their norm."""
    residual_dropout: float = 0.0
    """Dropout rate on the output of each attention and feed-forward block."""
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities."""
    classifier_dropout: float = 0.0
    """Dropout rate on what the classifier reads."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank terms beside projections."""
    adapter_dim: int = 0
    """Width of Houlsby's adapters behind attention and feed-forward (arXiv:1902.00751); 0 = none."""
    prompt_len: int = 0
    """Learned vectors in front of every text (prompt tuning, arXiv:2104.08691), which count in max_len; 0 = none."""
    init_std: float = 0.02
    """Standard deviation of initial matrices and tables."""
    scale_residual_init: bool = True
    """Divide the initial output projections by the root of a stack's residual sums (2 n_layers), as GPT-2 does."""
    attention: Literal["auto", "xla", "cudnn", "blocked"] = "auto"
    """Attention implementation; auto = cudnn on GPUs where it serves, blocked on CPUs, else xla."""
    compute_dtype: Float = "float32"
    """Of matrix products and activations; softmax, norms and loss stay in float32."""
    param_dtype: Float = "float32"
    """Of the parameters."""
    remat: Literal["none", "dots", "offload", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or each whole layer; offload = as dots,
    with the products kept in the host's memory until then."""
    unroll: int = 0
    """Layers per loop iteration, 0 = all: more runs faster and compiles slower; changes no name, shape or value."""

    def __post_init__(self) -> None:
        """Checks what can be told without data or devices."""
        for name, hint in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal:
                check(value in allowed, f"model.{name} is {value!r}; choose one of {', '.join(allowed)}")
        for name in ("d_model", "n_layers", "n_heads", "max_len", "vocab_multiple"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name} is {value}; it must be at least 1")
        for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "window"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"model.{name} is {value}; it must be at least 1, or None")
        check(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model};"
            f" choose a divisor or set model.head_dim",
        )
        check(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads = {self.kv_heads} does not divide model.n_heads = {self.n_heads}; choose a divisor",
        )
        check(
            self.positions != "rope" or self.width_of_head % 2 == 0,
            f"model.positions = rope needs an even head width, found {self.width_of_head}; change model.n_heads",
        )
        for name in ("rope_theta", "rope_factor", "rope_low_frequency", "rope_original_len", "norm_epsilon"):
            check(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be above 0")
        check(
            self.rope_high_frequency > self.rope_low_frequency,
            f"model.rope_high_frequency = {self.rope_high_frequency} is not above model.rope_low_frequency ="
            f" {self.rope_low_frequency}; raise it",
        )
        for name in _NOT_NEGATIVE:
            check(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("embedding_dropout", "residual_dropout", "attention_dropout", "classifier_dropout"):
            rate = getattr(self, name)
            check(0.0 <= rate < 1.0, f"model.{name} is {rate}; a dropout rate is in [0, 1)")
        check(
            0 <= self.unroll <= self.n_layers,
            f"model.unroll = {self.unroll} is not between 0 (all) and model.n_layers = {self.n_layers}",
        )
        self._check_family()

    def _check_family(self) -> None:
        """Checks the settings that make a model an encoder, a decoder or both."""
        check(
            not self.encoder_layers or self.mask == "causal",
            f"model.mask = {self.mask} does not go with model.encoder_layers = {self.encoder_layers}:"
            " the encoder sees both sides anyway and the decoder is causal; set model.mask to causal",
        )
        check(
            not self.encoder_layers or not self.token_types,
            f"model.token_types = {self.token_types} does not go with model.encoder_layers = {self.encoder_layers};"
            " set one of them to 0",
        )
        check(
            self.share_embeddings or self.encoder_layers > 0,
            "model.share_embeddings is False, and without an encoder there is one table only;"
            " set it to True, or model.encoder_layers above 0",
        )
        check(
            self.relative_buckets >= 4 and self.relative_buckets % 4 == 0,
            f"model.relative_buckets is {self.relative_buckets}; it must be a multiple of 4",
        )
        check(
            self.relative_distance > self.relative_buckets // 2,
            f"model.relative_distance = {self.relative_distance} is not above half of"
            f" model.relative_buckets = {self.relative_buckets}; raise it",
        )
        check(
            not (self.n_classes or self.pooler) or self.pooling != "first" or self.mask != "causal",
            "model.pooling = first, and the first token of a causal model sees nothing but itself;"
            " set model.pooling to last or mean",
        )
        check(
            not self.prompt_len or not self.encoder_layers,
            f"model.prompt_len = {self.prompt_len} does not go with model.encoder_layers = {self.encoder_layers};"
            " set model.lora.rank or model.adapter_dim instead",
        )
        check(
            self.prompt_len < self.max_len,
            f"model.prompt_len = {self.prompt_len} leaves no room in model.max_len = {self.max_len}; lower it",
        )
        check(
            self.lora.rank <= self.d_model,
            f"model.lora.rank is {self.lora.rank}, more than model.d_model = {self.d_model}: terms of a higher rank"
            " than the matrices; lower it",
        )
        targets = [path for path in self.projections if re.fullmatch(self.lora.targets, path)]
        check(
            targets or not self.lora.rank,
            f"model.lora.targets is {self.lora.targets!r} and matches none of {', '.join(self.projections)}; it is a"
            " regular expression that matches whole paths: choose among these",
        )

    @property
    def projections(self) -> list[str]:
        """Paths of the projections that may have a low-rank term."""
        mlp = [f"mlp/{name}" for name in ("up", "gate", "down") if name != "gate" or self.activation in GATED]
        own = [f"attention/{name}" for name in ("query", "key", "value", "out")]
        crossed = [f"cross_{name}" for name in own] if self.encoder_layers else []
        found = [f"layers/{name}" for name in own + crossed + mlp]
        return found + ([f"encoder_layers/{name}" for name in own + mlp] if self.encoder_layers else [])

    @property
    def context(self) -> int:
        """The longest text: `max_len` without the learned prompt."""
        return self.max_len - self.prompt_len

    @property
    def kv_heads(self) -> int:
        """K: key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def width_of_head(self) -> int:
        """H: head width."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def width_of_mlp(self) -> int:
        """F: feed-forward width."""
        if self.d_ff is not None:
            return self.d_ff
        if self.activation in GATED:
            return math.ceil(8 * self.d_model / 3 / 128) * 128
        return 4 * self.d_model

    def with_vocabulary(self, tokenizer_size: int) -> "ModelConfig":
        """This model with its vocabulary settled for a tokenizer of so many ids.

        Raises:
          UserError: the model's vocabulary has no row for some of the tokenizer's ids.
        """
        if self.vocab_size is None:
            rounded = math.ceil(tokenizer_size / self.vocab_multiple) * self.vocab_multiple
            return dataclasses.replace(self, vocab_size=rounded)
        check(
            self.vocab_size >= tokenizer_size,
            f"the tokenizer has {tokenizer_size} ids but model.vocab_size is {self.vocab_size};"
            f" set model.vocab_size to {tokenizer_size} or more, or to None to take the tokenizer's",
        )
        return self
