"""Configuration of a DSpark draft head."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

BACKBONES = ("qwen3", "gemma4", "deepseek_v4")
SEQUENTIAL_HEADS = ("vanilla", "gated", "rnn")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class DSparkConfig(Qwen3Config):
    """What a [`DSparkHead`] is made of: a draft backbone, a sequential head and a confidence head.

    The backbone is described by the keys of `Qwen3Config` (`hidden_size` and `vocab_size` are the target's). Beyond
    those:

    Args:
        backbone (`str`, defaults to `"qwen3"`): family of the draft layers, a module of `backbones`.
        stage_config (`dict`, *optional*): keys of the target's own config, for a backbone of the target's own layers
            (DeepSeek V4), which has more of them than there are here.
        block_size (`int`, defaults to 7): rows of a block: the anchor and `block_size - 1` mask tokens.
        sample_from_anchor (`bool`, defaults to `True`): whether the anchor's row is the first prediction. If not, as in
            z-lab's DFlash, `block_size - 1` tokens are drafted; see `gamma`.
        mask_token_id (`int`): a token id that text never uses; its embedding stands for "to be drafted".
        target_layer_ids (`list[int]`): target layers whose outputs are fed to the head, strictly increasing;
            -1 is the embedding output.
        num_target_layers (`int`): number of layers of the target.
        markov_rank (`int`, defaults to 256): rank of the sequential head; 0 means none (a DFlash head).
        markov_head_type (`str`): `"vanilla"`, `"gated"` or `"rnn"`; ignored when `markov_rank` is 0.
        enable_confidence_head (`bool`): whether the head estimates the acceptance of its drafts.
        confidence_head_with_markov (`bool`): whether that estimate also sees the previous token's Markov embedding.
        confidence_head_bias (`bool`, defaults to `True`): whether a number is added to it.
        confidence_temperatures, confidence_shifts (`list[float]`, *optional*): one of each a position; the logits of
            the confidence head are divided by the one, then the other is added. Written by `dspark-hf calibrate`.
        borrow_embeddings (`bool`): whether the checkpoint leaves the embedding and the LM head to the target.
            DeepSpec's heads carry copies (`False`); heads made by [`~DSparkConfig.from_target`] borrow.
        borrow_lm_head (`bool`, *optional*): the same of the LM head alone, where the two differ.
        borrow_logit_scaling (`bool`, defaults to `True`): whether what the target does to the output of its LM head
            (scaling, a cap) is done to drafts that go through it. Trainers that leave it out (SpecForge,
            Model-Optimizer, z-lab, speculators) make heads for its output as it is.
        draft_vocab_size (`int`, *optional*): size of a reduced draft vocabulary; by default all tokens can be drafted.
        window_counted_from (`str`): `"row"` or `"block"`, where the window of sliding layers (`layer_types`,
            `sliding_window`) is counted from. sliding_is_causal (`bool`): whether a row of a sliding layer is kept
            from seeing the rows behind it. See `backbones.mask`.
        attention_k_eq_v (`bool`): whether a Gemma 4 backbone takes the keys as values.
        final_logit_softcapping (`float`, *optional*): c of c * tanh(logits / c), before the sequential head.
        embedding_scale (`float`, *optional*): multiplies raw rows of the embedding; by default the embedding module
            does what it does for the target.
        target_name_or_path (`str`, *optional*), target_architectures (`list[str]`, *optional*): the target that the
            head was made for, where its trainer says so.
        target_sliding (`dict`, *optional*): what a Gemma 4 target's sliding layers are like (the draft has none).

    Raises:
        ValueError: when the fields contradict each other.
    """

    model_type = "dspark"

    backbone: str = "qwen3"
    stage_config: dict | None = None
    block_size: int = 7
    sample_from_anchor: bool = True
    mask_token_id: int | None = None
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    markov_rank: int = 256
    markov_head_type: str | None = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    confidence_head_bias: bool = True
    confidence_temperatures: list[float] | None = None
    confidence_shifts: list[float] | None = None
    borrow_embeddings: bool = False
    borrow_lm_head: bool | None = None
    borrow_logit_scaling: bool = True
    draft_vocab_size: int | None = None
    window_counted_from: str = "row"
    sliding_is_causal: bool = True
    attention_k_eq_v: bool = False
    final_logit_softcapping: float | None = None
    embedding_scale: float | None = None
    target_name_or_path: str | None = None
    target_architectures: list[str] | None = None
    target_sliding: dict | None = None

    def __post_init__(self, **kwargs):
        # `Qwen3Config` drops the window unless `use_sliding_window` is set; here `layer_types` decides.
        window = self.sliding_window
        super().__post_init__(**kwargs)
        self.sliding_window = window if "sliding_attention" in self.layer_types else None
        if self.borrow_lm_head is None:
            self.borrow_lm_head = self.borrow_embeddings
        if self.markov_rank == 0:
            self.markov_head_type = None
            self.confidence_head_with_markov = False
        self._check()

    @property
    def gamma(self) -> int:
        """Draft tokens a round."""
        return self.block_size - (not self.sample_from_anchor)

    @property
    def scales_as_target(self) -> bool:
        """Whether drafts get the target's scaling and cap of logits; a cap of the head's own stands for both."""
        return self.borrow_lm_head and self.borrow_logit_scaling and self.final_logit_softcapping is None

    def _check(self) -> None:
        if self.gamma < 1:
            raise ValueError(f"`block_size` must leave at least 1 draft, got {self.block_size}.")
        if self.backbone not in BACKBONES:
            raise ValueError(f"`backbone` must be one of {', '.join(BACKBONES)}, got {self.backbone!r}.")
        if (self.backbone == "deepseek_v4") != (self.stage_config is not None):
            raise ValueError(
                f"`stage_config` holds the keys of a 'deepseek_v4' backbone and of no other, got {self.stage_config} "
                f"with {self.backbone!r}."
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError(f"`layer_types` {self.layer_types} need a `sliding_window`.")
        if self.markov_rank < 0:
            raise ValueError(f"`markov_rank` must be 0 (no sequential head) or positive, got {self.markov_rank}.")
        if self.markov_rank and self.markov_head_type not in SEQUENTIAL_HEADS:
            raise ValueError(
                f"`markov_head_type` must be one of {', '.join(SEQUENTIAL_HEADS)}, got {self.markov_head_type!r}."
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` {self.mask_token_id} is outside the vocabulary of {self.vocab_size} tokens."
            )
        for name in ("confidence_temperatures", "confidence_shifts"):
            values = getattr(self, name)
            if values is not None and len(values) != self.gamma:
                raise ValueError(f"`{name}` must be {self.gamma} numbers, one a draft of the block, got {values}.")
        if self.confidence_temperatures is not None and min(self.confidence_temperatures) <= 0:
            raise ValueError(f"`confidence_temperatures` must be positive, got {self.confidence_temperatures}.")
        ids = self.target_layer_ids
        if ids is None:
            return
        if not ids or any(a >= b for a, b in zip(ids, ids[1:], strict=False)) or ids[0] < -1:
            raise ValueError(f"`target_layer_ids` must be strictly increasing and at least -1, got {ids}.")
        if self.num_target_layers is not None and ids[-1] >= self.num_target_layers:
            raise ValueError(
                f"`target_layer_ids` {ids} reach beyond a target of {self.num_target_layers} layers "
                f"(the last layer is {self.num_target_layers - 1})."
            )

    def own_keys(self) -> dict[str, Any]:
        """All keys but those that transformers gives to every model without a need."""
        generic = PreTrainedConfig().to_dict()
        generic.pop("transformers_version")
        own = {key: value for key, value in self.to_dict().items() if key not in generic or generic[key] != value}
        own.pop("_name_or_path", None)
        return own

    @classmethod
    def from_target(
        cls,
        target_config: PreTrainedConfig,
        block_size: int = 7,
        num_hidden_layers: int = 5,
        markov_rank: int = 256,
        markov_head_type: str = "vanilla",
        target_layer_ids: list[int] | None = None,
        mask_token_id: int | None = None,
        backbone: str = "qwen3",
        **kwargs: Any,
    ) -> "DSparkConfig":
        """Configuration of a fresh head for a decoder-only target.

        Args:
            target_config: the target's config (`target.config`).
            num_hidden_layers: draft layers.
            target_layer_ids: target layers to feed; by default up to 5, spread from layer 1 to the third from last.
            mask_token_id: by default the highest id that the target's config does not name as a special token.
                Models pad their embedding beyond the tokenizer, so that row is usually free; pass the id of a mask
                or reserved token where it is not.
            backbone: `"gemma4"` makes draft layers like the full-attention ones of a Gemma 4 target.
            kwargs: any other key of the config, such as `intermediate_size` or `enable_confidence_head`.

        Raises:
            ValueError: for an encoder-decoder target, and for a Gemma 4 backbone beside another target.
        """
        if target_config.is_encoder_decoder:
            raise ValueError(
                f"A DSpark head drafts for decoder-only targets; {target_config.model_type!r} is an encoder-decoder."
            )
        text = target_config.get_text_config(decoder=True)
        # Of fields that differ by layer, the first layer's.
        layer = getattr(text, "per_layer_config", [text])[0]
        heads = layer.num_attention_heads
        fields = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": _mlp_width(layer),
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
            "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // heads,
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
            "rope_parameters": _plain_rope(text),
            "num_target_layers": text.num_hidden_layers,
            "target_layer_ids": target_layer_ids or _spread_layers(text.num_hidden_layers),
            "mask_token_id": _free_token(text) if mask_token_id is None else mask_token_id,
            "block_size": block_size,
            "num_hidden_layers": num_hidden_layers,
            "markov_rank": markov_rank,
            "markov_head_type": markov_head_type,
            "borrow_embeddings": True,
            # Pipelines take an assistant with other special tokens for one with another tokenizer.
            **{name: getattr(text, name, None) for name in SPECIAL_TOKENS},
            "dtype": text.dtype,
            "backbone": backbone,
        }
        if backbone == "gemma4":
            fields |= _gemma4_keys(text)
        return cls(**fields | kwargs)


def _gemma4_keys(text: PreTrainedConfig) -> dict[str, Any]:
    """What draft layers and logits are like, as in DeepSpec's heads for Gemma 4."""
    rope = getattr(text, "rope_parameters", None) or {}
    if "full_attention" not in rope or not hasattr(text, "attention_k_eq_v"):
        raise ValueError(f"A 'gemma4' backbone is for Gemma 4 targets; this one is a {text.model_type!r}.")
    full = text.per_layer_config[text.layer_types.index("full_attention")]
    sliding = text.per_layer_config[text.layer_types.index("sliding_attention")]
    kept = {key: getattr(sliding, key) for key in ("head_dim", "num_key_value_heads", "sliding_window")}
    return {
        "head_dim": full.head_dim,
        "num_key_value_heads": full.num_key_value_heads,
        "attention_k_eq_v": text.attention_k_eq_v,
        "hidden_act": text.hidden_activation,
        "rope_parameters": rope["full_attention"],
        "embedding_scale": text.hidden_size**0.5,
        "final_logit_softcapping": text.final_logit_softcapping,
        "target_sliding": kept | {"rope_parameters": rope["sliding_attention"]},
    }


def _mlp_width(layer: PreTrainedConfig) -> int:
    width = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
    return width[0] if isinstance(width, list) else width


def _spread_layers(num_layers: int, most: int = 5) -> list[int]:
    """Layer ids from 1 to num_layers - 3, evenly; the last layers are left out, as in the released heads."""
    first, last = min(1, num_layers - 1), max(num_layers - 3, min(1, num_layers - 1))
    count = min(most, last - first + 1)
    if count == 1:
        return [last]
    return [first + round(i * (last - first) / (count - 1)) for i in range(count)]


def _free_token(text: PreTrainedConfig) -> int:
    special = set()
    for name in SPECIAL_TOKENS:
        value = getattr(text, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    return next(token for token in range(text.vocab_size - 1, -1, -1) if token not in special)


def _plain_rope(text: PreTrainedConfig) -> dict[str, Any]:
    """The target's rotary base; of variants by layer type, the full-attention one."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10000.0}
