"""The hook into `generate`, and the only file that touches private names of transformers.

`generate` looks its decoding method up on the class of the model. One wrapper around the assisted one hands calls
whose assistant is a [`DSparkHead`] to our rounds; one around the validation before it raises our errors early. With
any other assistant both call straight through.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import transformers
from transformers import GenerationMixin
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..scheduling.load import in_flight
from ..scheduling.settings import NAMES, asked_of_the_call
from . import attention, loop, packing
from .candidate_generator import DSparkCandidateGenerator
from .compatibility import check_mode, check_pair, reason_for_plain
from .releases import RELIED_ON, TESTED, differences

logger = logging.get_logger(__name__)

# Arguments of a decoding method that plain decoding does not take; and all that are no inputs of the model.
ASSISTANCE = {"assistant_model", "assistant_tokenizer", "tokenizer", "inputs_tensor"}
METHOD_ARGUMENTS = ASSISTANCE | set(RELIED_ON["_assisted_decoding"])

_stock_loop: ContextVar[bool] = ContextVar("dspark_stock_loop", default=False)


@contextmanager
def stock_loop() -> Iterator[None]:
    """Within this context a head drafts for transformers' own assisted-generation loop (batch 1) instead of ours."""
    token = _stock_loop.set(True)
    try:
        yield
    finally:
        _stock_loop.reset(token)


def install() -> None:
    """Wrap `GenerationMixin` once; repeated calls change nothing.

    In a release that is not as we know it only `generate` is wrapped: a call with a head then raises.
    """
    if hasattr(GenerationMixin.generate, "_dspark"):
        return
    found = differences()
    GenerationMixin.generate = _wrap_generate(GenerationMixin.generate, found)
    if found:
        return
    GenerationMixin._assisted_decoding = _wrap_decoding(GenerationMixin._assisted_decoding)
    GenerationMixin._validate_generation_mode = _wrap_validation(GenerationMixin._validate_generation_mode)
    GenerationMixin._get_candidate_generator = _wrap_generator(GenerationMixin._get_candidate_generator)
    GenerationMixin._sample = _wrap_plain(GenerationMixin._sample)
    packing.install()
    attention.install()


def _wrap_generate(stock, differences: list[str]):
    @functools.wraps(stock)
    def generate(self, *args, **kwargs):
        if not isinstance(kwargs.get("assistant_model"), DSparkHead):
            return stock(self, *args, **kwargs)
        if differences:
            from .. import __version__

            raise RuntimeError(
                f"dspark-hf {__version__} knows transformers {TESTED}, but in transformers {transformers.__version__} "
                f"{', and '.join(differences)}. Install a release of transformers that it knows, or a newer dspark-hf."
            )
        with asked_of_the_call(_draft_settings(kwargs)):
            return stock(self, *args, **kwargs)

    generate._dspark = True
    return generate


def _draft_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call says of drafting; later, transformers has filled in what it did not say."""
    sources = (kwargs.get, lambda name: getattr(kwargs.get("generation_config"), name, None))
    said = {
        name: next((value for value in (source(name) for source in sources) if value is not None), None)
        for name in NAMES
    }
    return {name: value for name, value in said.items() if value is not None}


def _wrap_decoding(stock):
    @functools.wraps(stock)
    def _assisted_decoding(self, input_ids, *args, **kwargs):
        if not isinstance(kwargs.get("assistant_model"), DSparkHead) or _stock_loop.get():
            return stock(self, input_ids, *args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if name not in METHOD_ARGUMENTS}
        reason = reason_for_plain(self, input_ids, inputs)
        if reason is None:
            return loop.generate(self, input_ids, *args, **kwargs)
        logger.warning_once(f"Decoding without the DSpark head, as without `assistant_model`: {reason}.")
        plain = {name: value for name, value in kwargs.items() if name not in ASSISTANCE}
        return self._sample(input_ids, *args, **plain)

    return _assisted_decoding


def _wrap_plain(stock):
    @functools.wraps(stock)
    def _sample(self, input_ids, *args, **kwargs):
        # Calls without a head are load for those with one.
        with in_flight(input_ids.device, len(input_ids)):
            return stock(self, input_ids, *args, **kwargs)

    return _sample


def _wrap_validation(stock):
    @functools.wraps(stock)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        head = generation_mode_kwargs.get("assistant_model")
        if isinstance(head, DSparkHead):
            check_pair(self, head)
            check_mode(generation_mode, generation_config)
        return stock(self, generation_mode, generation_config, generation_mode_kwargs)

    return _validate_generation_mode


def _wrap_generator(stock):
    @functools.wraps(stock)
    def _get_candidate_generator(self, *args, **kwargs):
        head = kwargs.get("assistant_model")
        if not isinstance(head, DSparkHead):
            return stock(self, *args, **kwargs)
        return DSparkCandidateGenerator(head, self, kwargs["generation_config"], kwargs["logits_processor"])

    return _get_candidate_generator
