"""DSparkHead: a draft head that proposes a block of tokens from the hidden states of its target."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import dspark_kernels
import torch
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedModel

from .backbones import backbone_of
from .backbones.mask import draft_mask
from .confidence_head import ConfidenceHead
from .configuration_dspark import DSparkConfig
from .sequential_heads import OUTSIDE, VanillaHead, as_drafted, build_sequential_head
from .shared_embeddings import LMHead, Logits, SharedEmbeddings, is_plain, raw_rows, same, target_logits

# Draft tokens [R] from logits [R, V], and what they were sampled from ([R, V], `None` when they are the argmax).
DraftSampler = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
# A mask for all layers, or one a layer type.
Masks: TypeAlias = torch.Tensor | dict[str, torch.Tensor]
# See `DSparkHead.forward`.
Finish: TypeAlias = Callable[["KnownBlocks"], Any]


@dataclass(frozen=True)
class DraftBlock:
    """A drafted block of G tokens for each of R rows.

    tokens: [R, G] int64, -1 where the head's logits were no distribution. logits: [R, G, V], what each token was
    sampled from (after temperature and warpers); `None` for greedy drafts. confidence_logits: [R, G], their sigmoid
    estimates the probability that a token is accepted given that those before it were; `None` without a confidence
    head.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None
    confidence_logits: torch.Tensor | None

    def spread(self, rows: torch.Tensor, count: int) -> "DraftBlock":
        """The block with its lines at the given rows [R] of `count`, and zeros in the others."""

        def spread(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)

        return DraftBlock(spread(self.tokens), spread(self.logits), spread(self.confidence_logits))


@dataclass(frozen=True)
class KnownBlocks:
    """What a pass over blocks of known text gives: of N blocks in each of b sequences the G rows that predict.

    normed: [b, N, G, d], what the LM head reads. mixed: [b, N, G, r], what W2 of the sequential head is multiplied by;
    `None` without one. confidence_logits: [b, N, G], `None` without a confidence head. logits: [n, V] from n rows of
    each of `made_of`, `parameters` what else it goes by that learns.
    """

    normed: torch.Tensor
    mixed: torch.Tensor | None
    confidence_logits: torch.Tensor | None
    logits: Callable[..., torch.Tensor]
    parameters: tuple[nn.Parameter, ...]

    @property
    def made_of(self) -> tuple[torch.Tensor, ...]:
        """What logits are made of."""
        return (self.normed,) if self.mixed is None else (self.normed, self.mixed)


class DSparkHead(PreTrainedModel):
    """Draft head of DSpark: context projection, backbone, sequential head and confidence head.

    Pass it as `assistant_model` to `generate` of the model it was trained for:

    ```python
    head = DSparkHead.from_pretrained("deepseek-ai/dspark_qwen3_4b_block7", dtype=torch.bfloat16, device_map="cuda")
    model.generate(**inputs, assistant_model=head)
    ```

    Released heads carry copies of the target's embedding and LM head. The first time such a head meets a target
    (in `generate`, or by calling [`~DSparkHead.share_embeddings`]) each copy that equals the target's, on the same
    device and in the same dtype, is freed and the target's is used from then on. `save_pretrained` still writes the
    copies.

    How many tokens are drafted is set, as for any assistant of transformers, on `head.generation_config`:
    `num_assistant_tokens` is the most (`config.gamma` at first); `num_assistant_tokens_schedule` is `"load"`, which
    weighs the tokens that a draft may bring against what steps cost and the load of the device, or `"constant"`;
    `assistant_confidence_threshold`, when set, keeps drafts that survive with a lower probability from verification;
    `draft_window`, when set, is how many of the last tokens of the context the head sees and keeps, where it was
    trained on shorter texts than it meets, or memory is short. `load_sensor` may be set to a
    [`~scheduling.load.LoadSensor`].

    How a head is loaded, saved and published is in `heads.py`: `from_pretrained`, `for_target`, `save_pretrained` and
    `push_to_hub`.
    """

    config_class = DSparkConfig
    base_model_prefix = ""
    _no_split_modules = ["DraftLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # speculators' mask of the draft vocabulary says what `d2t` says.
    _keys_to_ignore_on_load_unexpected = [r"^t2d$"]

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        if config.target_layer_ids is None or config.mask_token_id is None:
            raise ValueError(
                "A DSparkConfig needs `target_layer_ids` and `mask_token_id`; "
                "`DSparkConfig.from_target(target.config)` chooses both."
            )
        family, width = backbone_of(config), config.hidden_size
        draft_vocab_size = config.draft_vocab_size or config.vocab_size
        self.embed_tokens = None if config.borrow_embeddings else nn.Embedding(config.vocab_size, width)
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = family.RMSNorm(width, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(family.DraftLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = family.RMSNorm(width, eps=config.rms_norm_eps)
        # Of a backbone of several streams a token.
        self.hc_head = family.StreamHead(config) if hasattr(family, "StreamHead") else None
        self._keep_in_fp32_modules_strict = getattr(family, "KEPT_IN_FLOAT32", None)
        self.rotary_emb = family.RotaryEmbedding(config)
        self.lm_head = None if config.borrow_lm_head else nn.Linear(width, draft_vocab_size, bias=False)
        if config.draft_vocab_size is not None:
            # Draft token i is target token i + d2t[i].
            self.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.int64))
        self.markov_head = build_sequential_head(config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self.generation_config = default_settings(config)
        self.load_sensor: Callable[[], int] | None = None
        # What `_calibration` was asked for last, and its answer.
        self._calibrated_by: tuple = None, None
        # Parameters of the target that stand in for freed copies: (embedding weight, LM head weight).
        self._shared_weights: dict[str, torch.Tensor] = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The head's own embedding, `None` where it uses the target's."""
        return self.embed_tokens

    # -- The tables ---------------------------------------------------------------------------------------------

    def share_embeddings(self, target: PreTrainedModel) -> SharedEmbeddings:
        """The embedding and LM head to draft with beside `target`; frees copies that equal the target's."""
        embed, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
        # A target that scales its lookups cannot stand in for a table that does not, even if their weights agree.
        if type(embed) is nn.Embedding or self.config.embedding_scale is not None:
            self._free("embed_tokens", embed, type(embed))
        self._free("lm_head", lm_head, nn.Linear)
        vocab_size = target.config.get_text_config(decoder=True).vocab_size
        return SharedEmbeddings(
            embed if self.embed_tokens is None else self.embed_tokens,
            self._logits_beside(target),
            vocab_size,
            self._shared_with(vocab_size),
        )

    def _free(self, name: str, module: nn.Module, kind: type[nn.Module]) -> None:
        """Let the target's module stand in for the head's copy of it."""
        own = getattr(self, name)
        if own is not None and is_plain(module, kind) and same(own.weight, module.weight):
            self._shared_weights[name] = module.weight
            setattr(self, name, None)

    def _logits_beside(self, target: PreTrainedModel) -> Logits:
        if self.lm_head is not None:
            return LMHead(self.lm_head, self.lm_head.weight.dtype)
        if self.config.scales_as_target:
            return target_logits(target)
        return LMHead(target.get_output_embeddings(), target.dtype)

    def _shared_with(self, vocab_size: int) -> int:
        """How many of the draft vocabulary are tokens of a target that has so many; they come first."""
        if self.config.draft_vocab_size is None:
            return min(self.config.vocab_size, vocab_size)
        if vocab_size >= self.config.vocab_size:
            return self.config.draft_vocab_size
        return int((self.draft_tokens < vocab_size).sum())

    def _known(self, tokens: torch.Tensor, embeddings: SharedEmbeddings) -> torch.Tensor:
        """The tokens [...], in place of those that only the target knows the mask token."""
        if embeddings.vocab_size <= self.config.vocab_size:
            return tokens
        return tokens.where(tokens < self.config.vocab_size, self.config.mask_token_id)

    # -- Pieces of a draft --------------------------------------------------------------------------------------

    def project_context(self, features: torch.Tensor) -> torch.Tensor:
        """H_ctx = RMSNorm(W_c [H^(l1); ..; H^(lm)]): target states [R, C, m*d] -> [R, C, d]."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.device, self.fc.weight.dtype)))

    def backbone(
        self,
        block: torch.Tensor,
        context: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Hidden states [R, Q, d] after the final norm; where the backbone has streams, these made one, before it.

        Args:
            block: embeddings of the block tokens, [R, Q, d].
            context: projected context that is not in the cache yet, [R, C, d].
            positions: [R, C + Q] int64, absolute positions of context and block.
            masks: bool, broadcastable to [R, 1, Q, keys]; keys are what the cache returns, or context then block.
        """
        rope = self.rotary_emb(block, positions)
        if self.hc_head is not None:
            block = self.hc_head.spread(block)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            block = layer(block, context, rope, masks if torch.is_tensor(masks) else masks[kind], cache)
        return self.norm(block) if self.hc_head is None else self.hc_head(block)

    def read(self, context: torch.Tensor, positions: torch.Tensor, cache: Cache) -> None:
        """Take projected context [R, C, d] at absolute positions [R, C] into the cache, without a block: its keys and
        values depend on nothing that a layer computes."""
        rope = self.rotary_emb(context, positions)
        for layer in self.layers:
            cache.update(*layer.self_attn.cached(context, rope), layer.self_attn.layer_idx)

    @functools.cached_property
    def mask_rules(self) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """For each type of layer what its rows see, given key positions and the anchor's; see `draft_mask`."""
        config = self.config
        sliding = {
            "window": config.sliding_window,
            "counted_from": config.window_counted_from,
            "causal": config.sliding_is_causal,
        }
        return {
            kind: functools.partial(
                draft_mask, size=config.block_size, **(sliding if kind == "sliding_attention" else {})
            )
            for kind in set(config.layer_types)
        }

    def embed_block(self, anchors: torch.Tensor, embeddings: SharedEmbeddings) -> torch.Tensor:
        """Embeddings [..., block_size, d] of anchor [...] followed by mask tokens."""
        ids = anchors.new_full((*anchors.shape, self.config.block_size), self.config.mask_token_id)
        ids[..., 0] = anchors if self.embed_tokens is None else self._known(anchors, embeddings)
        scale = self.config.embedding_scale
        if scale is None:
            embedded = embeddings.embed(ids)
        else:
            embedded = raw_rows(embeddings.embed, ids)
            # Rounded as the models that scale their embedding do it.
            embedded = embedded * torch.tensor(scale, dtype=embedded.dtype)
        return embedded.to(self.fc.weight.device, self.fc.weight.dtype)

    def base_logits(self, hidden: torch.Tensor, embeddings: SharedEmbeddings) -> torch.Tensor:
        """Logits [..., V] of the parallel stage, before the sequential head: of the tokens of the draft vocabulary that
        the target has, all of its own if the head was made for as many."""
        return self._logits_of(self._normed(hidden), embeddings)

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.hc_head is None else self.norm(hidden)

    def _logits_of(self, normed: torch.Tensor, embeddings: SharedEmbeddings) -> torch.Tensor:
        logits, cap = embeddings.logits(normed).to(normed.device), self.config.final_logit_softcapping
        if self.config.draft_vocab_size in (None, logits.shape[-1]):
            logits = logits[..., : embeddings.shared]
        else:
            logits = logits[..., self.draft_tokens[: embeddings.shared]]
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def draft_tokens(self) -> torch.Tensor:
        """[draft vocabulary] int64, the target's ids of a reduced draft vocabulary."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def in_target_vocabulary(self, logits: torch.Tensor, embeddings: SharedEmbeddings) -> torch.Tensor:
        """Logits [..., V] of all tokens of the target from those that can be drafted."""
        if logits.shape[-1] == embeddings.vocab_size:
            return logits
        logits = logits.float()
        if self.config.draft_vocab_size is None:
            return nn.functional.pad(logits, (0, embeddings.vocab_size - embeddings.shared), value=OUTSIDE)
        whole = logits.new_full((*logits.shape[:-1], embeddings.vocab_size), OUTSIDE)
        return whole.index_copy_(-1, self.draft_tokens[: embeddings.shared], logits)

    def confidence_logits(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        """[..., B] from hidden states [..., B, d] and the tokens before each position [..., B]."""
        if self.confidence_head is None:
            return None
        embedded = self.markov_head.embed(previous) if self.config.confidence_head_with_markov else None
        return self.confidence_head(hidden, embedded)

    def calibrated(self, confidence_logits: torch.Tensor) -> torch.Tensor:
        """Confidence [..., G] from the logits of the first G positions, with the temperatures and shifts of the config
        if it has them (sequential temperature scaling); none, 0, where a logit is NaN."""
        logits = confidence_logits.float()
        positions = slice(logits.shape[-1])
        temperatures, shifts = self._calibration(logits.device)
        if temperatures is not None:
            logits = logits / temperatures[positions]
        if shifts is not None:
            logits = logits + shifts[positions]
        return logits.sigmoid().nan_to_num(0.0)

    def _calibration(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Temperatures and shifts of the config on the device. Made once, as the host waits for such a copy."""
        values = self.config.confidence_temperatures, self.config.confidence_shifts
        key = (*(None if own is None else tuple(own) for own in values), device)
        if self._calibrated_by[0] != key:
            # Also where a round is in inference mode: they are kept.
            with torch.inference_mode(False):
                made = [
                    None if own is None else torch.tensor(own, dtype=torch.float32, device=device) for own in values
                ]
            self._calibrated_by = key, made
        return self._calibrated_by[1]

    def sample_block(
        self,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        embeddings: SharedEmbeddings,
        length: int,
        sampler: DraftSampler,
    ) -> DraftBlock:
        """The sequential stage: p_k = softmax(U_k + B_k), left to right.

        Args:
            hidden: [R, B, d]. anchors: [R]. length: positions to draft, at most `config.gamma`.
            sampler: called once a position, in order, see `BlockProcessors.draft_sampler`.
        """
        anchors = self._known(anchors, embeddings)
        passed, hidden = hidden[:, : -self.config.gamma], hidden[:, -self.config.gamma :]
        base_logits = self.base_logits(hidden[:, :length], embeddings)
        if self._fuses(sampler, base_logits, embeddings):
            return self._sample_fused(passed, hidden[:, :length], base_logits, anchors, sampler)
        previous, state, tokens, sampled_from = anchors, None, [], []
        for k in range(length):
            embedded = None if self.markov_head is None else self.markov_head.embed(previous)
            logits = base_logits[:, k]
            if self.markov_head is not None:
                state = self._initial_state(passed, embedded) if k == 0 else state
                bias, state = self.markov_head.step(hidden[:, k], embedded, state)
                logits = logits + bias[..., : embeddings.shared]
            token, processed = sampler(self.in_target_vocabulary(logits, embeddings))
            previous = token.clamp(min=0)
            tokens.append(token)
            sampled_from.append(processed)
        tokens = torch.stack(tokens, dim=1)
        return DraftBlock(
            tokens,
            None if sampled_from[0] is None else torch.stack(sampled_from, dim=1),
            self.confidence_logits(hidden[:, : tokens.shape[1]], before(anchors, tokens)),
        )

    def _fuses(self, sampler: DraftSampler, base_logits: torch.Tensor, embeddings: SharedEmbeddings) -> bool:
        """Whether kernels draft the block: what is chosen must depend on the logits and a temperature only, and all
        tokens must be among them."""
        temperature = getattr(sampler, "temperature", None)
        chains = (
            self.markov_head is not None and base_logits.shape[-1] == embeddings.vocab_size == self.config.vocab_size
        )
        return chains and temperature is not None and dspark_kernels.uses_kernels(base_logits)

    def _initial_state(self, passed: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor | None:
        """State of the sequential head before the first draft: rows that predict nothing, [..., 0 or 1, d], take a step
        all the same."""
        state = self.markov_head.initial_state(embedded)
        for hidden in passed.unbind(-2):
            _, state = self.markov_head.mix(hidden, embedded, state)
        return state

    def _sample_fused(
        self,
        passed: torch.Tensor,
        hidden: torch.Tensor,
        base_logits: torch.Tensor,
        anchors: torch.Tensor,
        sampler: Any,
    ) -> DraftBlock:
        """`sample_block` with few launches a position, for the vanilla head one."""
        count, head = base_logits.shape[1], self.markov_head

        def seeds() -> torch.Tensor | None:
            return dspark_kernels.random_seeds(len(anchors), anchors.device) if sampler.sample else None

        w1, w2 = head.markov_w1.weight, head.markov_w2.weight
        if type(head) is VanillaHead:
            tokens, logits = dspark_kernels.sample_block(base_logits, w1, w2, anchors, seeds(), sampler.temperature)
        else:
            previous, state, found = anchors, None, []
            for k in range(count):
                embedded = head.embed(previous)
                state = self._initial_state(passed, embedded) if k == 0 else state
                mixed, state = head.mix(hidden[:, k], embedded, state)
                token, of = dspark_kernels.sample_position(base_logits[:, k], mixed, w2, seeds(), sampler.temperature)
                previous = token.clamp(min=0)
                found.append((token, of))
            tokens = torch.stack([token for token, _ in found], dim=1)
            logits = torch.stack([of for _, of in found], dim=1) if sampler.sample else None
        tokens, logits = as_drafted(tokens, logits)
        return DraftBlock(tokens, logits, self.confidence_logits(hidden, before(anchors, tokens)))

    # -- Training -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        context_features: torch.Tensor,
        anchor_positions: torch.Tensor,
        block_mask: Masks,
        embeddings: SharedEmbeddings,
        positions: torch.Tensor | None = None,
        finish: Finish | None = None,
    ) -> Any:
        """Teacher-forced drafts of N blocks a sequence, as training needs them.

        Args:
            input_ids: [b, T]. context_features: [b, T, m*d]. anchor_positions: [b, N], places in the sequence.
            block_mask: [b, 1, N*B, T + N*B] bool or one a layer type, see `training.blocks.attention_masks`.
            positions: [b, T], of tokens in their documents, for sequences that hold several; 0 to T - 1 by default.
            finish: what is to be made of the blocks, tensors or a tuple of them. It is called inside of the pass:
                sharded parameters are whole only there, and whoever needs logits need not hold them all at once.

        Returns:
            what `finish` returns; by default hidden states [b, N, G, d], logits after the sequential head [b, N, G, V]
            and confidence logits [b, N, G] (`None` without a confidence head) of the G = `config.gamma` rows of each
            block that predict: row j follows the token at anchor + j.
        """
        batch, length = input_ids.shape
        size, gamma = self.config.block_size, self.config.gamma
        if positions is None:
            positions = torch.arange(length, device=input_ids.device).expand(batch, -1)
        offsets = torch.arange(size, device=input_ids.device)
        rows = positions.gather(1, anchor_positions)[..., None] + offsets
        block = self.embed_block(input_ids.gather(1, anchor_positions), embeddings).flatten(1, 2)
        hidden = self.backbone(
            block,
            self.project_context(context_features),
            torch.cat([positions, rows.flatten(1)], dim=1),
            block_mask,
        ).unflatten(1, (-1, size))
        passed, hidden = hidden[..., :-gamma, :], hidden[..., -gamma:, :]
        behind = (anchor_positions[..., None] + offsets[:gamma]).clamp(max=length - 1)
        previous = input_ids.gather(1, behind.flatten(1)).view_as(behind)
        blocks = self._known_blocks(passed, hidden, previous, embeddings)
        if finish is not None:
            return finish(blocks)
        return hidden, blocks.logits(*blocks.made_of), blocks.confidence_logits

    def _known_blocks(
        self, passed: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor, embeddings: SharedEmbeddings
    ) -> KnownBlocks:
        """Of rows that predict nothing, [b, N, 0 or 1, d], those that do, [b, N, G, d], and the tokens before these."""
        mixed, tables_that_learn = None, [] if self.lm_head is None else [self.lm_head.weight]
        if self.markov_head is not None:
            embedded = self.markov_head.embed(previous)
            state = self._initial_state(passed, embedded[..., 0, :])
            mixed = self.markov_head.mix_block(hidden, embedded, state)
            tables_that_learn.append(self.markov_head.markov_w2.weight)

        def logits(normed: torch.Tensor, mixed: torch.Tensor | None = None) -> torch.Tensor:
            base = self._logits_of(normed, embeddings)
            return base if mixed is None else base + self.markov_head.markov_w2(mixed)

        return KnownBlocks(
            self._normed(hidden),
            mixed,
            self.confidence_logits(hidden, previous),
            logits,
            tuple(weight for weight in tables_that_learn if weight.requires_grad),
        )

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict with copies of the target's tables that were freed."""
        freed = {f"{name}.weight": weight.detach().clone() for name, weight in self._shared_weights.items()}
        return self.state_dict() | freed


def before(anchors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[R, G], the token before each draft [R, G] behind anchors [R]."""
    return torch.cat([anchors[:, None], tokens[:, :-1].clamp(min=0)], dim=1)


def default_settings(config: DSparkConfig) -> GenerationConfig:
    """How a fresh head drafts."""
    return GenerationConfig(num_assistant_tokens=config.gamma, num_assistant_tokens_schedule="load", draft_window=None)
