"""The cards in hub_cards/: in step with their template and data, understood by huggingface_hub, snippets that run."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Case, case_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from shares import rest_slow
from test_cli import run
from test_deepseek_v4 import folders as v4_cases
from test_eval import add_tokenizer, with_tokenizer
from transformers import AutoTokenizer

from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation.results import read_results
from dspark_hf.hub.cards import Card, render
from dspark_hf.hub.registry import published_heads

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "hub_cards"
PAPER_NOTES = ROOT.parent / "shared" / "PAPER.md"
EVALUATED = CARDS / "data" / "embedded_pair.json"
# What the Hub knows, from its documentation of model cards.
RELATIONS = ("adapter", "finetune", "merge", "quantized")
TEMPLATE = "{% for message in messages %}{{ '5 6 7 ' }}{% endfor %}"


def load_build():
    spec = importlib.util.spec_from_file_location("build_cards", CARDS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names() -> list[str]:
    return sorted(path.name for path in CARDS.glob("*.md") if path.name not in ("template.md", "README.md"))


def metadata(name: str) -> dict:
    return yaml.safe_load(REGEX_YAML_BLOCK.search((CARDS / name).read_text()).group(2))


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_cards_are_in_step_with_template_and_data():
    """`python hub_cards/build.py` writes what is there, one card for each published head and one for the pair."""
    made = load_build().cards()
    assert sorted(made) == names() and len(made) == len(published_heads()) + 1
    for name, text in made.items():
        assert (CARDS / name).read_text() == text, name
    assert (CARDS / "template.md").read_text() == (ROOT / "dspark_hf" / "hub" / "card_template.md").read_text()


@pytest.mark.parametrize("name", names())
def test_front_matter(name):
    found = metadata(name)
    data = ModelCard((CARDS / name).read_text()).data
    assert data.to_dict().keys() == found.keys()
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert all(isinstance(tag, str) for tag in found["tags"]) and "speculative-decoding" in found["tags"]
    if name != "embedded_pair.md":
        assert found["base_model"].count("/") == 1 and found["base_model_relation"] in RELATIONS
    index = found.get("model-index")
    if index is None:
        assert data.eval_results is None
        return
    title, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(title, results) == index
    assert len({result.unique_identifier for result in results}) == len(results) == len(index[0]["results"])
    for result in results:
        assert 1 < result.metric_value < 9 and result.metric_type == "accepted_length"


@pytest.mark.parametrize("name", names())
def test_numbers_have_one_source(name):
    """Those of the paper or our own, in the table as in the front matter; links are relative or lead to the Hub."""
    text = (CARDS / name).read_text()
    paper, ours = "), table 1:" in text, "Measured with `dspark-hf eval`" in text
    results = ModelCard(text).data.eval_results or []
    assert not (paper and ours) and bool(results) == (paper or ours)
    for result in results:
        assert (result.source_name is not None) == paper
        assert re.search(rf"^\| {re.escape(result.dataset_name)} \|.* {result.metric_value:.2f} \|", text, re.MULTILINE)
    for link in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"https?://[^\s)>\"']+", text):
        assert link.startswith("https://huggingface.co/") or (CARDS / link).exists(), link


def test_numbers_of_the_embedded_pair_are_those_of_its_evaluation():
    text, evaluated = (CARDS / "embedded_pair.md").read_text(), read_results(EVALUATED)
    assert evaluated["date"] in text and evaluated["device"] in text and evaluated["dtype"] == "float32"
    for result in evaluated["results"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {result['name']} | {result['prompts']}"))
        assert f"| {result['accepted_length']:.2f} | {result['verify_rate']:.1%} |" in row
        assert all(f" {p['acceptance']:.1%} " in row for p in result["positions"])


@pytest.mark.skipif(not PAPER_NOTES.exists(), reason="the notes on the paper are not here")
def test_numbers_of_the_paper():
    paper, notes = json.loads((CARDS / "data" / "paper.json").read_text()), PAPER_NOTES.read_text()
    for head, numbers in paper["heads"].items():
        method, target, size = re.match(r"deepseek-ai/(dspark|dflash)_([a-z0-9]+)_(\d+b)_block7", head).groups()
        row = f"| {target.capitalize()}-{size.upper()} | {'DSpark' if method == 'dspark' else 'DFlash'} | "
        assert row + " | ".join(f"{number:.2f}" for number in numbers) + " |" in notes


def fixture_of(head) -> Case:
    """A small checkpoint in the layout of a published head; its family and method too, where there is such a one."""
    if head.dialect == "dflash":
        return case_of("zlab_dflash_qwen3")
    if head.dialect == "speculators":
        return case_of("speculators_qwen3_dspark")
    if "gemma-4" in head.target:
        return case_of("deepspec_gemma4_vanilla")
    return case_of(f"deepspec_qwen3_{'dflash' if head.method == 'dflash' else 'vanilla'}")


def inside(folder: Path) -> Path:
    """A small checkpoint of a target with its head inside."""
    if not v4_cases():
        pytest.skip("no case of DeepSeek V4: set DSPARK_FIXTURES to the whole set")
    shutil.copytree(v4_cases()[0] / "checkpoint", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return add_tokenizer(folder)


# One of the heads inside their targets stands for all, which differ by name and take long.
WITH_SNIPPETS = [head for head in published_heads() if head.head != head.target or head.head.endswith("Flash-DSpark")]
# Of those beside their targets one of every layout.
QUICK = list({head.dialect: head for head in reversed(WITH_SNIPPETS) if head.head != head.target}.values())


@pytest.mark.parametrize("head", rest_slow(WITH_SNIPPETS, QUICK), ids=lambda head: head.head)
def test_snippets_of_published_heads(head, hub, tmp_path, capsys):
    """Word for word, on small checkpoints of the same layout under the ids of the card."""
    if head.head == head.target:
        target = inside(tmp_path / "target")
    else:
        case = fixture_of(head)
        target = with_tokenizer(case, tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    hub(head.target, target)
    if head.head != head.target:
        hub(head.head, case.folder / "head")
    text = (CARDS / f"{head.head.replace('/', '__')}.md").read_text()
    codes = snippets(text, "python")
    assert len(codes) == 2 and head.head in codes[0] and head.target in codes[1]
    for code in codes:
        exec(compile(code, head.head, "exec"), {"__name__": "__main__"})
    tau = re.search(r"(\d\.\d\d) tokens a round", capsys.readouterr().out)
    assert float(tau.group(1)) >= 1


def test_snippets_of_the_embedded_pair(capsys):
    for code in snippets((CARDS / "embedded_pair.md").read_text(), "python"):
        exec(compile(code, "embedded_pair", "exec"), {"__name__": "__main__"})
    assert "tokens a round" in capsys.readouterr().out


@pytest.mark.parametrize("head", published_heads(), ids=lambda head: head.head)
def test_commands_to_serve(head):
    """Not run here, as vLLM needs a GPU: they name the right repositories, and options that vLLM documents."""
    commands = snippets((CARDS / f"{head.head.replace('/', '__')}.md").read_text(), "shell")
    if (head.dialect, head.method) == ("deepspec", "dflash") or head.dialect == "specforge":
        assert not commands
        return
    program, verb, model, *options = shlex.split(commands[0])
    assert (program, verb) == ("vllm", "serve") and model in (head.target, head.head)
    if model == head.target:
        assert options[0] == "--speculative-config"
        config = json.loads(options[1])
        assert config.get("model", head.target) == head.head and config["method"] == head.method
        assert config.keys() <= {"method", "model", "num_speculative_tokens"}


def test_the_card_of_a_published_folder(hub, tmp_path, capsys):
    """The card that `publish` writes: its three snippets, of which the first needs no import of this package."""
    hub("someone/target", FOLDER / "target")
    options = ["--repo", "someone/head", "--model", "someone/target", "--results", str(EVALUATED)]
    run("publish", str(FOLDER / "head"), *options, "--dry-run", "--output", str(tmp_path / "repository"))
    hub("someone/head", tmp_path / "repository")
    text = (tmp_path / "repository" / "README.md").read_text()
    first, second = snippets(text, "python")
    assert "dspark_hf" not in first and len(snippets(text, "shell")) == 1
    for code in (first, second):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "tokens a round" in capsys.readouterr().out
    card = ModelCard(text)
    assert card.data.base_model == "someone/target" and "custom_generate" in card.data.tags
    assert [r.metric_value for r in card.data.eval_results] == [
        round(result["accepted_length"], 2) for result in read_results(EVALUATED)["results"]
    ]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://huggingface.co/") or (tmp_path / "repository" / link).exists()
    file = tmp_path / "card.md"
    run("card", str(FOLDER / "head"), *options, "--output", str(file))
    assert file.read_text() == text
    assert run("card", str(FOLDER / "head"), *options).strip() == text.strip()
    hub("someone/as-is", FOLDER / "head")
    as_is = run("card", "someone/as-is", "--model", "someone/target")
    assert "No numbers are known" in as_is and "custom_generate" not in as_is


def test_cards_that_are_refused(tmp_path, vanilla):
    results = read_results(EVALUATED)
    with pytest.raises(ValueError, match="not of both"):
        Card("x", "a/x", "a/y", "dspark", {}, paper={"settings": "", "rows": []} | {"x": 1}, results=results)
    head = tmp_path / "head"
    shutil.copytree(vanilla.folder / "head", head)
    with pytest.raises(ValueError, match="results are of another head"):
        run("card", str(head), "--repo", "a/b", "--results", str(EVALUATED))
    file = tmp_path / "other.json"
    for content, message in [("{", "is not JSON"), ("[]", "not a file that"), ('{"format": 1}', "not a file that")]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            run("card", str(head), "--repo", "a/b", "--model", "a/c", "--results", str(file))
    with pytest.raises(ValueError, match="give --repo"):
        run("card", str(head), "--model", "a/c")
    with pytest.raises(ValueError, match="Give --model"):
        run("card", str(head), "--repo", "a/b")


def test_a_head_without_confidence_has_no_such_columns():
    results = read_results(EVALUATED)
    for result in results["results"]:
        result |= {"ece": None, "auc": None, "brier": None}
    text = str(render(Card("x", "a/x", "a/y", "dflash", {}, results=results)))
    assert "ECE" not in text and "dflash2026" in text
