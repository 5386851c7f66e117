"""A transformers `CandidateGenerator`, so that the stock assisted-generation loop can draft with a head at batch 1."""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import ModelOutput

from ..modeling_dspark import DSparkHead
from ..scheduling.settings import Settings
from .drafting import Drafter
from .hidden_states import indices_of, request_for
from .processors import BlockProcessors, Prefixes


class DSparkCandidateGenerator(CandidateGenerator):
    """Proposes the head's block as candidates for transformers' own loop.

    Args:
        head: the draft head. target: the model that verifies. generation_config, logits_processor: of the call.
    """

    requires_model_outputs: bool = True

    def __init__(
        self,
        head: DSparkHead,
        target: PreTrainedModel,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None = None,
    ):
        self.head = head
        self.drafter = Drafter(head, target, rows=1)
        self.processors = BlockProcessors(logits_processor or LogitsProcessorList(), generation_config.do_sample)
        self.max_length = generation_config.max_length
        self.most = Settings.read(head.generation_config, head.config.gamma, generation_config).most
        self.hidden_state_indices = indices_of(head.config.target_layer_ids)
        self.model_kwargs_overrides: dict[str, Any] = {"output_hidden_states": request_for(self.hidden_state_indices)}

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: ModelOutput | None = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Candidates behind `input_ids` [1, length].

        Returns:
            [1, length + drafts] and, when sampling, the logits [1, drafts, V] that the drafts were sampled from.
            No drafts before the target's first pass (there are no hidden states yet) and at the length limit.
        """
        room = self.max_length - input_ids.shape[1] - 1
        if is_first_iteration or room < 1:
            return input_ids, None
        # The states that the head has not seen: those of every committed token but the last, the anchor.
        unseen = input_ids.shape[1] - 1 - self.drafter.cache.lengths[0]
        chosen = [model_outputs.hidden_states[i][:, :unseen] for i in self.hidden_state_indices]
        self.drafter.append(torch.cat([states.to(self.drafter.device) for states in chosen], dim=-1), [unseen])
        block = self.drafter.draft(
            input_ids[:, -1],
            min(self.most, room),
            self.processors.draft_sampler(Prefixes([input_ids[0]], [0])),
        )
        return torch.cat([input_ids, block.tokens.clamp(min=0).to(input_ids.device)], dim=1), block.logits
