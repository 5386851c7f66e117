"""What `import dspark_hf` changes in transformers, and what it does not."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_head, tiny_target
from transformers import GenerationConfig, GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dspark_hf
from dspark_hf.generation import releases
from dspark_hf.generation.hook import install

STOCK_GENERATION = """
import sys, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
if {imported}:
    import dspark_hf
else:
    assert "dspark_hf" not in sys.modules
def model(seed, layers):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2)).eval()
target, assistant = model(0, 3), model(1, 1)
ids = torch.arange(3, 19)[None]
for kwargs in ({{}}, {{"assistant_model": assistant}}, {{"prompt_lookup_num_tokens": 3}}):
    for sampled in (False, True):
        torch.manual_seed(5)
        out = target.generate(input_ids=ids, max_new_tokens=24, do_sample=sampled, return_dict_in_generate=True,
            output_scores=True, **kwargs)
        total = sum(s.double().clamp(-99, 99).sum().item() for s in out.scores)
        print(type(out).__name__, out.sequences.tolist(), total)
try:
    target.generate(input_ids=ids.repeat(2, 1), assistant_model=assistant, max_new_tokens=4)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_other_assistants_behave_as_without_the_import():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", STOCK_GENERATION.format(imported=imported)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for imported in (False, True)
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("GenerateDecoderOnlyOutput") == 6 and "batch_size = 1" in outputs[0]


@pytest.mark.slow
def test_import_is_light():
    heavy = ("triton", "gradio", "accelerate", "datasets", "matplotlib", "rich", "typer")
    # transformers itself loads some of them when they are installed.
    code = f"""
import sys
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.qwen3 import modeling_qwen3
before = set(sys.modules)
import dspark_hf
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_installing_twice_changes_nothing():
    before = GenerationMixin._assisted_decoding
    install()
    assert GenerationMixin._assisted_decoding is before


def test_this_release_is_as_we_know_it():
    assert releases.differences() == []


@pytest.mark.slow
def test_a_release_that_differs_is_an_error_that_names_both_versions():
    """A future `GenerationMixin` that calls its cache otherwise: nothing but one error for calls with a head."""
    code = """
import torch, transformers
from transformers import GenerationMixin, Qwen3Config, Qwen3ForCausalLM
def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, memory=None, **kwargs):
    raise AssertionError("the target must not be asked")
stock = GenerationMixin.prepare_inputs_for_generation
GenerationMixin.prepare_inputs_for_generation = prepare_inputs_for_generation
import dspark_hf
from conftest import tiny_head, tiny_target
target = tiny_target()
try:
    target.generate(input_ids=torch.tensor([[3, 4]]), assistant_model=tiny_head(target), max_new_tokens=4)
except RuntimeError as error:
    print(error)
GenerationMixin.prepare_inputs_for_generation = stock
print(target.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=4).shape)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    error, shape = result.stdout.strip().splitlines()
    for part in (
        dspark_hf.__version__,
        transformers.__version__,
        releases.TESTED,
        releases.CACHE,
        "is_first_iteration",
    ):
        assert part in error
    assert shape == "torch.Size([1, 6])"


@pytest.mark.slow
def test_nothing_that_we_call_is_deprecated():
    """transformers logs some deprecations and warns of others; a call with a head does neither."""
    code = """
import warnings
warnings.simplefilter("error", FutureWarning)
import torch
from conftest import tiny_head, tiny_target
target = tiny_target()
out = target.generate(input_ids=torch.tensor([[3, 4], [5, 6]]), assistant_model=tiny_head(target), max_new_tokens=9,
    return_dict_in_generate=True, output_hidden_states=True, output_scores=True)
longer = torch.cat([out.sequences, torch.tensor([[7], [8]])], dim=1)
from dspark_hf.generation.releases import CACHE
target.generate(input_ids=longer, **{CACHE: out[CACHE]}, assistant_model=tiny_head(target), max_new_tokens=9)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert "deprecated" not in result.stderr + result.stdout


def test_draft_settings_of_a_call_count():
    target = tiny_target(sharpness=4)
    head = tiny_head(target)

    def longest_draft(**settings) -> int:
        kwargs = {"input_ids": torch.tensor([[3, 4]]), "assistant_model": head} | settings
        return max(target.generate(**kwargs).dspark.drafted_lengths[0])

    settings = {"max_new_tokens": 20, "return_dict_in_generate": True}
    assert longest_draft(**settings) == 4
    assert longest_draft(**settings, num_assistant_tokens=2) == 2
    assert longest_draft(generation_config=GenerationConfig(**settings, num_assistant_tokens=2)) == 2
    with pytest.raises(ValueError, match="num_assistant_tokens_schedule.*'soon'"):
        longest_draft(**settings, num_assistant_tokens_schedule="soon")


def test_output_class():
    target = tiny_target()
    output = target.generate(
        input_ids=torch.tensor([[3, 4]]),
        assistant_model=tiny_head(target),
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    assert isinstance(output, dspark_hf.DSparkGenerateOutput)
    assert isinstance(output.dspark, dspark_hf.DSparkStats)
    assert torch.equal(output["sequences"], output.sequences)


def test_plain_tensor_without_return_dict():
    target = tiny_target()
    out = target.generate(input_ids=torch.tensor([[3, 4]]), assistant_model=tiny_head(target), max_new_tokens=4)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.int64


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    target = tiny_target(sharpness=4)
    target.set_attn_implementation(implementation)
    kwargs = {"input_ids": torch.tensor([[3, 4, 5], [0, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    plain = target.generate(**kwargs, max_new_tokens=20)
    assert torch.equal(target.generate(**kwargs, max_new_tokens=20, assistant_model=tiny_head(target)), plain)


def test_the_attention_of_other_models_is_not_touched():
    """Also while passes of ours run: those of other threads get what they would without them."""
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    target = tiny_target(sharpness=3)
    head, kwargs = tiny_head(target), {"max_new_tokens": 60, "do_sample": False}
    prompts = [torch.tensor([[3, 9, 4, k], [0, 0, k, 5]]) for k in range(1, 7)]
    masks = [prompt != 0 for prompt in prompts]
    expected = [
        target.generate(prompt, attention_mask=mask, **kwargs) for prompt, mask in zip(prompts, masks, strict=True)
    ]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(
            lambda i: target.generate(
                prompts[i], attention_mask=masks[i], **kwargs, **({"assistant_model": head} if i % 2 else {})
            ),
            range(6),
        )
        assert all(map(torch.equal, found, expected))
    assert target.config._attn_implementation == "sdpa"


def test_a_pass_that_fails_leaves_the_attention_as_it_was(monkeypatch):
    target = tiny_target()
    head = tiny_head(target)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(target.lm_head, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        target.generate(torch.tensor([[3, 9]]), max_new_tokens=4, assistant_model=head)
    assert target.config._attn_implementation == "sdpa"
