"""What else a head's config may mean, or its settings be: the alternatives, and the tau of each on known texts.

The greedy text of a target does not depend on the head. So once it is there, with the hidden states that a head reads,
the rounds of any variant of the head are drafted without the target.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_dspark import DSparkConfig
from ..generation.drafting import Drafter
from ..generation.processors import BlockProcessors
from ..generation.target import Target
from ..modeling_dspark import DSparkHead
from ..scheduling.settings import HEAD_SETTINGS
from ..shared_embeddings import scales_logits

Keys = dict[str, Any]

# The base that Qwen3's config class has where a trainer gives it none.
DEFAULT_ROPE_THETA = 10000.0
# Of the heads that trainers have published.
BLOCK_SIZES = (3, 4, 5, 7, 8, 16)
# Heads are trained on texts of so many tokens or more.
WINDOWS = (512, 2048)
# Behind the end of a text.
NO_TOKEN = -1


@dataclass(frozen=True)
class Alternative:
    """Other values for keys of a `DSparkConfig`, or settings of a head's generation config. why: a clause about how a
    head comes to have the wrong ones."""

    keys: Keys
    why: str


@dataclass(frozen=True)
class KnownText:
    """tokens: [n] int64, a prompt and the target's greedy answer. start: of the answer."""

    tokens: torch.Tensor
    start: int


def alternatives(
    head: DSparkHead, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Iterator[Alternative]:
    """Every alternative to what a head is set to beside a target, one at a time.

    Args:
        longest: tokens of the longest text that is to be drafted.
    """
    config, text = head.config, model.config.get_text_config(decoder=True)
    for keys in _alignments(config):
        yield Alternative(keys, "trainers disagree whether the anchor's row is a prediction, and some leave it unsaid")
    for keys in _ropes(config, text):
        yield Alternative(keys, "heads are trained with their target's rotary embedding, or with 10000 by mistake")
    for keys in _layers(config, text.num_hidden_layers):
        yield Alternative(keys, "trainers count layers from 0 or from the embedding")
    for keys in _embeddings(config):
        yield Alternative(keys, "trainers disagree whether the embedding is scaled")
    for keys in _logits(config, model, text):
        yield Alternative(keys, "trainers disagree whether logits are scaled and capped as the target's are")
    for keys in _windows(config):
        yield Alternative(keys, "trainers disagree what a row of a sliding layer sees")
    for keys in _masks(config, tokenizer):
        yield Alternative(keys, "the mask token must be the one that the head was trained with")
    for keys in _layer_keys(config, text):
        yield Alternative(keys, "heads are trained with what their target has there")
    for keys in _blocks(config):
        yield Alternative(keys, "a block longer than the head was trained with spoils all of its drafts")
    for keys in _context(head, longest):
        yield Alternative(keys, "a head needs its context, but loses its way in one longer than it was trained on")


def _alignments(config: DSparkConfig) -> Iterator[Keys]:
    if config.block_size > 1:
        # What calibrates the positions is for as many as there were.
        keys = {"confidence_temperatures": None, "confidence_shifts": None}
        yield {"sample_from_anchor": not config.sample_from_anchor} | keys


def _ropes(config: DSparkConfig, text) -> Iterator[Keys]:
    own, theirs = config.rope_parameters, getattr(text, "rope_parameters", None) or {}
    theirs = theirs.get("full_attention") or theirs
    found = [own | {"rope_theta": base} for base in (theirs.get("rope_theta"), DEFAULT_ROPE_THETA) if base]
    found += [{"rope_type": "default", "rope_theta": own["rope_theta"]}]
    found += [theirs] if theirs.get("rope_theta") else []
    tried = [own]
    for rope in found:
        if rope not in tried:
            tried.append(rope)
            yield {"rope_parameters": rope}


def _layers(config: DSparkConfig, count: int) -> Iterator[Keys]:
    for step in (-1, 1):
        ids = [i + step for i in config.target_layer_ids]
        if ids[0] >= -1 and ids[-1] < count:
            yield {"target_layer_ids": ids}


def _embeddings(config: DSparkConfig) -> Iterator[Keys]:
    scale = config.hidden_size**0.5
    if config.embedding_scale is None:
        yield {"embedding_scale": scale}
    else:
        yield {"embedding_scale": None}
        if config.embedding_scale != 1:
            yield {"embedding_scale": 1.0}


def _logits(config: DSparkConfig, model: PreTrainedModel, text) -> Iterator[Keys]:
    cap = getattr(text, "final_logit_softcapping", None)
    if config.borrow_lm_head and scales_logits(model):
        yield {"borrow_logit_scaling": not config.borrow_logit_scaling}
    for other in {None, cap} - {config.final_logit_softcapping}:
        yield {"final_logit_softcapping": other}


def _windows(config: DSparkConfig) -> Iterator[Keys]:
    if "sliding_attention" not in config.layer_types:
        return
    yield {"layer_types": ["full_attention"] * config.num_hidden_layers}
    yield {"sliding_is_causal": not config.sliding_is_causal}
    yield {"window_counted_from": "block" if config.window_counted_from == "row" else "row"}


def _masks(config: DSparkConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Keys]:
    named = {i for token, i in tokenizer.get_added_vocab().items() if "mask" in token.lower()}
    tokens = named | {tokenizer.mask_token_id, tokenizer.pad_token_id, config.vocab_size - 1}
    for token in sorted(tokens - {None, config.mask_token_id}):
        if token < config.vocab_size:
            yield {"mask_token_id": token}


def _layer_keys(config: DSparkConfig, text) -> Iterator[Keys]:
    for key in ("rms_norm_eps", "hidden_act"):
        theirs = getattr(text, key, None)
        if theirs not in (None, getattr(config, key)):
            yield {key: theirs}


def _blocks(config: DSparkConfig) -> Iterator[Keys]:
    for size in BLOCK_SIZES:
        if size < config.block_size and size > (not config.sample_from_anchor):
            yield {"block_size": size, "confidence_temperatures": None, "confidence_shifts": None}


def _context(head: DSparkHead, longest: int) -> Iterator[Keys]:
    own = getattr(head.generation_config, "draft_window", None)
    for window in {None, *(window for window in WINDOWS if window < longest)} - {own}:
        yield {"draft_window": window}


def altered(head: DSparkHead, keys: Keys) -> DSparkHead:
    """The head with other values of some keys of its config and settings of its generation config; the weights are
    shared."""
    config = DSparkConfig(**head.config.own_keys() | {k: v for k, v in keys.items() if k not in HEAD_SETTINGS})
    twin = DSparkHead.from_pretrained(None, config=config, state_dict=head.full_state_dict(), dtype=head.dtype)
    twin.generation_config = copy.deepcopy(head.generation_config)
    for name in keys.keys() & set(HEAD_SETTINGS):
        setattr(twin.generation_config, name, keys[name])
    return twin.to(head.device).eval()


class Trials:
    """Drafts known texts with variants of a head.

    Args:
        texts: whose answers the target writes greedily, each of at least two tokens.
    """

    def __init__(self, model: PreTrainedModel, texts: list[KnownText]):
        self.model, self.texts = model, texts
        self.tokens = pad_sequence([text.tokens for text in texts], batch_first=True, padding_value=NO_TOKEN)
        self.features: dict[tuple[int, ...], torch.Tensor] = {}

    def tau(self, head: DSparkHead) -> float:
        """Mean tokens a round, bonus included."""
        rounds = sum(self.committed(head), [])
        return sum(rounds) / len(rounds)

    @torch.no_grad()
    def committed(self, head: DSparkHead) -> list[list[int]]:
        """Tokens of every round of every text, bonus included, as greedy decoding with whole blocks commits them."""
        features, gamma = self._features_for(head), head.config.gamma
        at, ends = [text.start for text in self.texts], [len(text.tokens) - 1 for text in self.texts]
        rounds: list[list[int]] = [[] for _ in self.texts]
        drafter = Drafter(head, self.model, len(self.texts))
        drafter.append(features[:, : max(at)], list(at))
        sampler = BlockProcessors(LogitsProcessorList(), do_sample=False).draft_sampler(None)
        # Behind the longest text there is nothing, and nobody looks at it.
        tokens = pad(self.tokens, (0, gamma + 1), value=NO_TOKEN)
        features = pad(features, (0, 0, 0, gamma + 1))
        while rows := [r for r, end in enumerate(ends) if at[r] < end]:
            lines = torch.tensor(at, device=tokens.device)[:, None] + torch.arange(gamma + 1, device=tokens.device)
            anchors, *behind = tokens.gather(1, lines).clamp(min=0).unbind(1)
            drafts = drafter.draft(anchors, gamma, sampler, rows).tokens.to(tokens.device)
            matches = drafts == torch.stack(behind, dim=1)[rows]
            counts = [0] * len(ends)
            for r, accepted in zip(rows, matches.long().cumprod(dim=1).sum(dim=1).tolist(), strict=True):
                counts[r] = min(accepted + 1, ends[r] - at[r])
                rounds[r].append(counts[r])
            drafter.append(features.take_along_dim(lines.to(features.device)[..., None], dim=1), counts)
            at = [start + count for start, count in zip(at, counts, strict=True)]
        return rounds

    def _features_for(self, head: DSparkHead) -> torch.Tensor:
        """[texts, longest, m*d], what the head reads."""
        layers = tuple(head.config.target_layer_ids)
        if layers not in self.features:
            target = Target(self.model, list(layers))
            passes = [target.forward(text.tokens[None], target.new_cache(1)) for text in self.texts]
            self.features[layers] = pad_sequence([one.features[0] for one in passes], batch_first=True)
        return self.features[layers]
