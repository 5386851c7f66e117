"""The hook into continuous batching: `generate_batch`, `init_continuous_batching` and
`continuous_batching_context_manager` take a head as `assistant_model`. Without one they are transformers' own."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..scheduling.settings import DRAFT_SETTINGS

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from .manager import DSparkBatchingManager

# Arguments that size, capture or keep something beforehand, which nothing here needs: slots grow with the rows.
BEFOREHAND = ("warmup", "workload_hints", "persistent_manager")


def install() -> None:
    """Wrap the three methods once; repeated calls change nothing."""
    if hasattr(GenerationMixin, "_dspark_batching"):
        return
    GenerationMixin._dspark_batching = True
    for own in (init_continuous_batching, continuous_batching_context_manager, generate_batch):
        stock = getattr(GenerationMixin, own.__name__, None)
        if stock is not None:
            setattr(GenerationMixin, own.__name__, _wrap(stock, own))


def _wrap(stock: Callable, own: Callable) -> Callable:
    @functools.wraps(stock)
    def method(self, *args, assistant_model=None, **kwargs):
        if assistant_model is None:
            return stock(self, *args, **kwargs)
        if not isinstance(assistant_model, DSparkHead):
            raise ValueError(
                "Continuous batching takes a DSpark head as `assistant_model`, got a "
                f"{type(assistant_model).__name__}. Leave it out, or use `generate`."
            )
        # By the names that the installed release has for them.
        kwargs |= dict(list(inspect.signature(stock).bind_partial(self, *args).arguments.items())[1:])
        unread = [name for name in BEFOREHAND if kwargs.pop(name, None)]
        if unread:
            logger.warning_once(f"{', '.join(unread)}: does nothing with a DSpark head; nothing is made beforehand.")
        return own(self, assistant_model=assistant_model, **kwargs)

    return method


def init_continuous_batching(
    self: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    *,
    assistant_model: DSparkHead,
    **drafting: Any,
) -> "DSparkBatchingManager":
    """The manager, which is yet to be started; for `drafting` see there."""
    from .manager import DSparkBatchingManager

    return DSparkBatchingManager(self, assistant_model, generation_config, continuous_batching_config, **drafting)


@contextmanager
def continuous_batching_context_manager(
    self: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    block: bool = True,
    timeout: float | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    *,
    assistant_model: DSparkHead,
    **drafting: Any,
) -> Iterator["DSparkBatchingManager"]:
    """A manager that runs within the context.

    Args:
        block: wait at the end for requests that have not ended, at most `timeout` seconds.
    """
    given = generation_config, continuous_batching_config
    manager = init_continuous_batching(self, *given, assistant_model=assistant_model, **drafting)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=block, timeout=timeout)


def generate_batch(
    self: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    *,
    assistant_model: DSparkHead,
    **settings: Any,
) -> "dict[str, GenerationOutput]":
    """The outputs of all prompts by the id of their request, in the order of the prompts.

    Args:
        settings: of all requests, as `generate` takes them.
    """
    from tqdm import tqdm

    from .manager import ids_of

    results: dict[str, GenerationOutput] = {}
    drafting = {name: settings.pop(name) for name in DRAFT_SETTINGS if name in settings}
    context: AbstractContextManager[DSparkBatchingManager] = continuous_batching_context_manager(
        self,
        generation_config,
        continuous_batching_config=continuous_batching_config,
        assistant_model=assistant_model,
        **drafting,
    )
    with context as manager, tqdm(total=len(inputs), disable=not progress_bar, unit="request") as bar:
        asked = manager.add_requests(inputs, record_timestamps=record_timestamps, **settings)
        sequences = settings.get("num_return_sequences", manager.defaults.num_return_sequences)
        ids = [own for request_id in asked for own in ids_of(request_id, sequences)]
        bar.total = len(ids)
        while len(results) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = result
                bar.update()
            elif result is None and not manager.is_running():
                break
    return {request_id: results[request_id] for request_id in ids if request_id in results}
