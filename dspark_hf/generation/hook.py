"""The hook into `generate`, and the only file that touches private names of transformers.

`generate` looks its decoding method up on the class of the model. One wrapper around the assisted one hands calls
whose assistant is a [`DSparkHead`] to our rounds; one around the validation before it raises our errors early. With
any other assistant both call straight through.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import transformers
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..scheduling.load import in_flight
from ..scheduling.settings import DRAFT_SETTINGS
from ..version import __version__
from . import attention, packing
from .candidate_generator import DSparkCandidateGenerator
from .compatibility import check_inputs, check_mode, check_pair, check_sequences, reason_for_plain
from .generate import generate
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
    if hasattr(GenerationMixin, "_dspark"):
        return
    GenerationMixin._dspark = True
    found = differences()
    if found:
        GenerationMixin.generate = _wrap_unknown(GenerationMixin.generate, found)
        return
    GenerationMixin._prepare_generation_config = _wrap_config(GenerationMixin._prepare_generation_config)
    GenerationMixin._assisted_decoding = _wrap_decoding(GenerationMixin._assisted_decoding)
    GenerationMixin._validate_generation_mode = _wrap_validation(GenerationMixin._validate_generation_mode)
    GenerationMixin._get_candidate_generator = _wrap_generator(GenerationMixin._get_candidate_generator)
    GenerationMixin._sample = _wrap_plain(GenerationMixin._sample)
    packing.install()
    attention.install()


def _wrap_unknown(stock: Callable, differences: list[str]) -> Callable:
    @functools.wraps(stock)
    def generate(self, *args, **kwargs):
        if isinstance(kwargs.get("assistant_model"), DSparkHead):
            raise RuntimeError(
                f"dspark-hf {__version__} knows transformers {TESTED}, but in transformers {transformers.__version__} "
                f"{', and '.join(differences)}. Install a release of transformers that it knows, or a newer dspark-hf."
            )
        return stock(self, *args, **kwargs)

    return generate


def _wrap_config(stock):
    @functools.wraps(stock)
    def _prepare_generation_config(self, generation_config=None, **kwargs):
        # What the call says of drafting, before what it does not say is filled in.
        asked = {name: kwargs.get(name, getattr(generation_config, name, None)) for name in DRAFT_SETTINGS}
        config, rest = stock(self, generation_config, **kwargs)
        config._dspark_asked = {name: value for name, value in asked.items() if value is not None}
        # Some releases forget it beside an assistant.
        config._dspark_static = config.cache_implementation == "static"
        return config, rest

    return _prepare_generation_config


def _wrap_decoding(stock):
    @functools.wraps(stock)
    def _assisted_decoding(self, input_ids, *args, **kwargs):
        if not isinstance(kwargs.get("assistant_model"), DSparkHead) or _stock_loop.get():
            return stock(self, input_ids, *args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if name not in METHOD_ARGUMENTS}
        check_inputs(inputs)
        reason = reason_for_plain(self, input_ids, inputs)
        if reason is None:
            return generate(self, input_ids, *args, **kwargs)
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
            # Of two vocabularies of different sizes the stock check would ask for tokenizers; ours has compared them.
            rest = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
            if not _stock_loop.get():
                # The stock loop cannot take back what recurrent layers have read; ours can.
                check_sequences(generation_config)
                sampled = generation_config.do_sample
                generation_mode = GenerationMode.SAMPLE if sampled else GenerationMode.GREEDY_SEARCH
            return stock(self, generation_mode, generation_config, rest)
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
