"""The ways people call `generate`: pipelines, adapters, other kinds of targets, threads, interrupts."""

import copy
import datetime
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from test_targets import VOCAB, bigram_head, build, check_same_tokens, prompts
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList, pipeline
from transformers.generation.streamers import BaseStreamer

from dspark_hf.generation import hook

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word per token: `w5` is 5. The padding token is 0."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", padding_side="left")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def head_for(target):
    """A head that knows the text which the target writes after `prompts`."""
    return bigram_head(target, target.generate(**prompts(3), max_new_tokens=40, do_sample=False)[:, 9:])


@pytest.fixture(scope="module")
def target():
    return build("qwen3")


@pytest.fixture(scope="module")
def head(target):
    return head_for(target)


# -- Pipelines and chat templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline(target, head, batch_size):
    texts = ["w5 w9 w2", "w7", "w11 w30 w4 w8 w21"]
    kwargs = {"max_new_tokens": 24, "do_sample": False, "batch_size": batch_size, "return_full_text": False}
    plain = pipeline("text-generation", model=target, tokenizer=tiny_tokenizer())(texts, **kwargs)
    ours = pipeline("text-generation", model=target, tokenizer=tiny_tokenizer(), assistant_model=head)
    drafts = []
    handle = head.fc.register_forward_pre_hook(lambda *_: drafts.append(1))
    assert ours(texts, **kwargs) == plain
    handle.remove()
    assert drafts, "the pipeline must have used the head"
    assert len(set(plain[0][0]["generated_text"].split())) > 4


def test_pipeline_with_a_chat(target, head):
    chat = [{"role": "user", "content": "w5 w9 w2"}]
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    plain = pipeline("text-generation", model=target, tokenizer=tiny_tokenizer())(chat, **kwargs)
    ours = pipeline("text-generation", model=target, tokenizer=tiny_tokenizer(), assistant_model=head)(chat, **kwargs)
    assert ours == plain
    assert plain[0]["generated_text"][-1]["role"] == "assistant"


def test_chat_template(target, head):
    chats = [[{"role": "user", "content": text}] for text in ("w5 w9 w2", "w7", "w11 w30 w4 w8")]
    inputs = tiny_tokenizer().apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    kwargs = dict(inputs) | {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(target.generate(**kwargs, assistant_model=head), target.generate(**kwargs))


def test_special_tokens_of_a_fresh_head_are_those_of_its_target():
    """Pipelines ask for an assistant tokenizer when they differ."""
    config = bigram_head(build("qwen3", eos_token_id=[3, 5], bos_token_id=2), torch.ones(1, 2, dtype=torch.long)).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, [3, 5])


# -- Other targets -----------------------------------------------------------------------------------------------------


def test_lora_target():
    peft = pytest.importorskip("peft")
    target = build("llama")
    bare = target.generate(**prompts(3), max_new_tokens=40, do_sample=False)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    target = peft.get_peft_model(target, config).eval()
    assert not torch.equal(target.generate(**prompts(3), max_new_tokens=40, do_sample=False), bare)
    check_same_tokens(target, head_for(target))
    with target.disable_adapter():
        check_same_tokens(target, head_for(target))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_decoded_without_the_head(kind, monkeypatch):
    """They change every step of plain decoding, which the call then is, with a warning."""
    peft = pytest.importorskip("peft")
    target = build("llama")
    head, bare = head_for(target), target.generate(**prompts(1), max_new_tokens=16, do_sample=False)
    target = peft.get_peft_model(target, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "prompt" in name:
                parameter.copy_(torch.randn_like(parameter))
    warnings = []
    monkeypatch.setattr(hook.logger, "warning_once", warnings.append)
    kwargs = prompts(1) | {"max_new_tokens": 16, "do_sample": False}
    plain = target.generate(**kwargs)
    assert torch.equal(target.generate(**kwargs, assistant_model=head), plain)
    assert len(warnings) == 1 and ("virtual tokens" in warnings[0] or "`past_key_values`" in warnings[0])
    if kind == "PromptTuningConfig":
        # transformers 5.24 takes no notice of the prefix that PEFT 0.21 passes.
        assert not torch.equal(plain, bare)


def test_an_adapter_for_each_row(monkeypatch):
    peft = pytest.importorskip("peft")
    target = build("llama")
    head = head_for(target)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    target = peft.get_peft_model(target, config, adapter_name="one").eval()
    target.add_adapter("two", config)
    warnings = []
    monkeypatch.setattr(hook.logger, "warning_once", warnings.append)
    for names in (["one", "two", "__base__"], ["two"]):
        kwargs = prompts(len(names)) | {"max_new_tokens": 16, "do_sample": False, "adapter_names": names}
        assert torch.equal(target.generate(**kwargs, assistant_model=head), target.generate(**kwargs))
    assert len(warnings) == 1 and "adapter_names" in warnings[0]


def test_int8_target():
    quantization = pytest.importorskip("torchao.quantization")
    target = build("llama")
    quantization.quantize_(target, quantization.Int8WeightOnlyConfig())
    check_same_tokens(target)


@pytest.mark.slow
def test_compiled_target():
    """`model.compile()` compiles the passes that `generate` makes; `torch.compile(model)` leaves them as they are."""
    target = build("llama", num_hidden_layers=2)
    head = head_for(target)
    check_same_tokens(torch.compile(target), head, batches=(1,))
    expected = target.generate(**prompts(3), max_new_tokens=24, do_sample=False)
    target.compile(dynamic=True)
    assert torch.equal(
        target.generate(**prompts(3), max_new_tokens=24, do_sample=False, assistant_model=head), expected
    )


@pytest.mark.slow
def test_target_compiled_without_code_generation():
    """As above, with the backend that only traces: seconds instead of minutes."""
    target = build("llama", num_hidden_layers=2)
    head = head_for(target)
    expected = target.generate(**prompts(3), max_new_tokens=24, do_sample=False)
    target.compile(backend="eager", dynamic=True)
    assert torch.equal(
        target.generate(**prompts(3), max_new_tokens=24, do_sample=False, assistant_model=head), expected
    )


@pytest.mark.parametrize("off", [["model.layers.2"], ["model.embed_tokens", "model.layers.1", "model.norm"]])
def test_target_partly_on_disk(tmp_path, off):
    """accelerate's hooks bring weights in for each call and move inputs, as they do between several devices."""
    accelerate = pytest.importorskip("accelerate")
    target = build("llama")
    modules = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    modules += [f"model.layers.{i}" for i in range(4)]
    device_map = {name: "disk" if name in off else "cpu" for name in modules}
    head = head_for(target)
    dispatched = accelerate.dispatch_model(
        copy.deepcopy(target), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    check_same_tokens(dispatched, head, reference=target)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_target_on_two_gpus(tmp_path):
    build("llama").save_pretrained(tmp_path)
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map |= {f"model.layers.{i}": i // 2 for i in range(4)}
    target = type(build("llama")).from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32).eval()
    inputs = {key: value.to(0) for key, value in prompts(3).items()} | {"max_new_tokens": 40, "do_sample": False}
    plain = target.generate(**inputs)
    head = bigram_head(target, plain[:, 9:].cpu()).to(1)
    assert torch.equal(target.generate(**inputs, assistant_model=head), plain)


# -- Padding -----------------------------------------------------------------------------------------------------------


def test_pad_token_that_is_the_eos_token(target, head):
    """Prompts hold the eos token as padding; rows end at it in different rounds and are filled with it."""
    inputs = prompts(3) | {"max_new_tokens": 40, "do_sample": False}
    free = target.generate(**inputs)[:, 9:]
    eos = next(token for token in free[0].tolist() if token not in free[1].tolist()[:5])
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] == 1, eos)
    plain = target.generate(**inputs, eos_token_id=eos, pad_token_id=eos)
    ours = target.generate(**inputs, eos_token_id=eos, pad_token_id=eos, assistant_model=head)
    assert ours.tolist() == plain.tolist()
    assert (plain[:, 9:] == eos).any()


# -- Threads -----------------------------------------------------------------------------------------------------------


def test_two_threads_with_one_target_and_one_head(target, head):
    ids = [torch.randint(1, VOCAB, (rows, 7)) for rows in (1, 2, 3, 2)]
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    alone = [target.generate(input_ids=x, attention_mask=torch.ones_like(x), **kwargs).tolist() for x in ids]

    def run(x):
        return target.generate(input_ids=x, attention_mask=torch.ones_like(x), **kwargs, assistant_model=head).tolist()

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(run, ids)) == alone


# -- Processes ---------------------------------------------------------------------------------------------------------


def synced(rank, port, results):
    """One of two processes whose targets wait for each other in every pass, as with ZeRO-3; texts of other lengths, and
    a schedule that would decide by each one's clock."""
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=wait)
    torch.set_num_threads(1)
    target = build("qwen3")
    inputs = prompts(1 + rank) | {"do_sample": False, "max_new_tokens": 24}
    free = target.generate(**inputs)
    head = bigram_head(target, free[:, 9:])
    head.generation_config.num_assistant_tokens_schedule = "load"
    drafts = []
    head.fc.register_forward_pre_hook(lambda *_: drafts.append(1) and None)
    inputs |= {"eos_token_id": free[0, 9 + 4].item()} if rank == 0 else {}
    plain = target.generate(**inputs)
    passes = []

    def wait_for_the_other(*_):
        passes.append(1)
        dist.all_reduce(torch.ones(1))

    target.register_forward_pre_hook(wait_for_the_other)
    found = target.generate(**inputs, synced_gpus=True, assistant_model=head)
    results[rank] = torch.equal(found, plain), len(passes), len(drafts)
    dist.barrier()


def test_synced_processes_end_together():
    port = free_port()
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(synced, (port, results), nprocs=2)
        (first, *passes), (second, *others) = results[0], results[1]
    assert first and second and passes == others and min(passes) > 0


# -- Interrupts --------------------------------------------------------------------------------------------------------


class FailingStreamer(BaseStreamer):
    """Raises when it is given tokens for the third time (the prompt is the first)."""

    def __init__(self, error):
        self.error, self.puts = error, 0

    def put(self, value):
        self.puts += 1
        if self.puts == 3:
            raise self.error

    def end(self):
        raise AssertionError("end() after an error")


class Lines(BaseStreamer):
    """Keeps the tokens of every row of a batch, as plain `generate` hands them over."""

    def __init__(self):
        self.steps, self.ended = [], False

    def put(self, value):
        self.steps.append(value.tolist())

    def end(self):
        self.ended = True


def test_streamer_of_a_batch(target, head):
    """One token of every row a step, padding for rows that have ended."""
    inputs = prompts(3) | {"max_new_tokens": 24, "do_sample": False}
    free = target.generate(**inputs)[:, 9:]
    eos = next(token for token in free[0].tolist()[3:] if token not in free[1].tolist()[:12])
    plain, ours = Lines(), Lines()
    target.generate(**inputs, eos_token_id=eos, streamer=plain)
    target.generate(**inputs, eos_token_id=eos, streamer=ours, assistant_model=head)
    assert ours.steps == plain.steps and ours.ended


def test_a_pad_token_that_is_no_token(target, head):
    """-1, as some configs of Llama have it; plain decoding never feeds it to the model here."""
    target.set_attn_implementation("eager")
    kwargs = prompts(3) | {"max_new_tokens": 12, "do_sample": False, "pad_token_id": -1}
    assert torch.equal(target.generate(**kwargs, assistant_model=head), target.generate(**kwargs))
    target.set_attn_implementation("sdpa")


class Interrupt:
    """A stopping criterion that is interrupted after four tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 12:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@pytest.mark.parametrize(
    "error, make",
    [
        (RuntimeError, lambda: {"streamer": FailingStreamer(RuntimeError("closed"))}),
        (KeyboardInterrupt, lambda: {"streamer": FailingStreamer(KeyboardInterrupt())}),
        (KeyboardInterrupt, lambda: {"stopping_criteria": StoppingCriteriaList([Interrupt()])}),
    ],
)
def test_interrupts_leave_model_and_head_as_they_were(target, head, error, make):
    inputs = prompts(1) | {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(**inputs)
    target.generate(**inputs, assistant_model=head)
    before = state_of(target) + state_of(head)
    with pytest.raises(error):
        target.generate(**inputs, assistant_model=head, **make())
    assert state_of(target) + state_of(head) == before
    assert torch.equal(target.generate(**inputs, assistant_model=head), plain)
    assert torch.equal(target.generate(**inputs), plain)


# -- Helpers -----------------------------------------------------------------------------------------------------------


def state_of(model) -> list[tuple]:
    """Attributes, hooks, buffers and settings of every module, comparable between two moments."""
    found = [(model.config.to_json_string(), str(getattr(model, "generation_config", None)), model.training)]
    for name, module in model.named_modules():
        plain = {key: repr(value) for key, value in vars(module).items() if isinstance(value, (int, float, str, bool))}
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, sorted(vars(module)), plain, hooks))
    return found + [(name, tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()]
