"""A head as a repository: what is written, that its snippet works, and what keeps it from being uploaded."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import in_cache, tiny_head, tiny_target
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from test_cli import run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import check_python_requirements

import dspark_hf
from dspark_hf.embedded import FOLDER
from dspark_hf.hub import publishing

ROOT = Path(__file__).parents[1]
EVALUATED = ROOT / "hub_cards" / "data" / "embedded_pair.json"
REPOSITORY, TARGET = "someone/tiny-head", "someone/tiny-math"
WRITTEN = [
    "README.md",
    "config.json",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "eval_results.json",
    "model.safetensors",
]


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def dry_run(output: Path, source: Path = FOLDER / "head") -> str:
    options = ["--repo", REPOSITORY, "--model", TARGET, "--results", str(EVALUATED), "--license", "mit"]
    # Where lines break depends on the length of the folder's name.
    return " ".join(run("publish", str(source), *options, "--dry-run", "--output", str(output)).split())


@pytest.fixture
def local_target(hub):
    """The embedded target as a repository that has been downloaded."""
    hub(TARGET, FOLDER / "target")
    return hub


def test_a_dry_run_writes_the_whole_repository(local_target, tmp_path):
    source = tmp_path / "trained"
    shutil.copytree(FOLDER / "head", source)
    for name in ("log.jsonl", "optimizer.bin", "training_args.json"):
        (source / name).write_text("not to be published")
    output = tmp_path / "repository"
    said = dry_run(output, source)
    assert f"drafts for {TARGET}" in said and "nothing was uploaded" in said
    assert files_of(output) == WRITTEN
    for name in ("config.json", "model.safetensors"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    # With names that others can use.
    named = json.loads(EVALUATED.read_text()) | {"head": REPOSITORY, "target": TARGET}
    assert json.loads((output / "eval_results.json").read_text()) == named
    card = (output / "README.md").read_text()
    assert f'custom_generate="{REPOSITORY}"' in card and "license: mit" in card and "base_model: " + TARGET in card
    before = {name: (output / name).read_bytes() for name in WRITTEN}
    dry_run(output, source)
    assert {name: (output / name).read_bytes() for name in files_of(output)} == before
    # A repository is a head too: its own results are taken along.
    run(
        "publish",
        str(output),
        "--repo",
        REPOSITORY,
        "--model",
        TARGET,
        "--dry-run",
        "--output",
        str(tmp_path / "again"),
    )
    assert files_of(tmp_path / "again") == WRITTEN


def test_draft_settings_are_published(local_target, tmp_path):
    head = dspark_hf.DSparkHead.from_pretrained(FOLDER / "head")
    head.generation_config.num_assistant_tokens = 3
    head.save_pretrained(tmp_path / "head")
    publishing.build(tmp_path / "head", REPOSITORY, tmp_path / "repository", target=TARGET)
    assert dspark_hf.DSparkHead.from_pretrained(tmp_path / "repository").generation_config.num_assistant_tokens == 3


def test_other_files_are_not_overwritten(local_target, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        dry_run(tmp_path / "mine")
    assert files_of(tmp_path / "mine") == ["thesis.tex"]


def test_custom_generate_gives_the_tokens_of_plain_generate(local_target, tmp_path, monkeypatch):
    """transformers' own mechanism, by repository and by folder."""
    folder = tmp_path / "repository"
    dry_run(folder)
    local_target(REPOSITORY, folder)
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    inputs = tokenizer("<|user|>What is 3 times 4?<|end|><|assistant|>", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=40)
    loads, load = [], dspark_hf.DSparkHead.from_pretrained

    def counted(*args, **kwargs):
        loads.append(args[0])
        return load(*args, **kwargs)

    monkeypatch.setattr(publishing.DSparkHead, "from_pretrained", counted)
    for source in (REPOSITORY, REPOSITORY, str(folder)):
        output = model.generate(
            **inputs,
            custom_generate=source,
            trust_remote_code=True,
            max_new_tokens=40,
            return_dict_in_generate=True,
        )
        assert output.sequences.tolist() == plain.tolist() and output.dspark.rounds > 0
    assert loads == [REPOSITORY, str(folder)]
    revision = (tmp_path / "hub" / "models--someone--tiny-head" / "refs" / "main").read_text()
    options = {"custom_generate": REPOSITORY, "trust_remote_code": True, "max_new_tokens": 40}
    assert model.generate(**inputs, **options, revision=revision).tolist() == plain.tolist()
    with pytest.raises(ValueError, match="brings its own draft head"):
        model.generate(**inputs, **options, assistant_model=load(FOLDER / "head"))


def test_requirements_are_what_transformers_checks(tmp_path):
    shutil.copytree(publishing.CUSTOM_GENERATE, tmp_path / "custom_generate")
    requirements = tmp_path / "custom_generate" / "requirements.txt"
    check_python_requirements(str(tmp_path), requirements_file="custom_generate/requirements.txt")
    assert f"dspark-hf>={version('dspark-hf')}" in requirements.read_text()
    requirements.write_text(requirements.read_text().replace("0.1.0", "99.0"))
    with pytest.raises(ImportError, match="dspark-hf>=99.0"):
        check_python_requirements(str(tmp_path), requirements_file="custom_generate/requirements.txt")


class Hub:
    """The Hub as `HfApi` shows it: repositories as folders, each with a count of its commits."""

    def __init__(self, folder: Path):
        self.folder, self.private, self.commits = folder, {}, {}

    def add(self, name: str, **files: str) -> None:
        self.private[name], self.commits[name] = False, 1
        (self.folder / name).mkdir(parents=True)
        for file, text in files.items():
            (self.folder / name / file.replace("__", ".")).write_text(text)

    def whoami(self, api):
        return {"name": "someone"}

    def model_info(self, api, name):
        if name not in self.commits:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        siblings = [SimpleNamespace(rfilename=file) for file in [*files_of(self.folder / name), ".gitattributes"]]
        return SimpleNamespace(private=self.private[name], siblings=siblings, sha=str(self.commits[name]))

    def hf_hub_download(self, api, name, file, revision, local_dir):
        return shutil.copy(self.folder / name / file, local_dir)

    def create_repo(self, api, name, private, exist_ok):
        if name not in self.commits:
            self.add(name)
            self.private[name] = private

    def upload_folder(self, api, *, repo_id, folder_path, commit_message, parent_commit, delete_patterns):
        assert parent_commit in (None, str(self.commits[repo_id]))
        for pattern in delete_patterns:
            for path in (self.folder / repo_id).glob(pattern):
                path.unlink()
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        self.commits[repo_id] += 1
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{self.commits[repo_id]}")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "remote")
    for name in ("whoami", "model_info", "hf_hub_download", "create_repo", "upload_folder"):

        def method(api, *args, _name=name, **kwargs):
            return getattr(hub, _name)(api, *args, **kwargs)

        monkeypatch.setattr(HfApi, name, method)
    return hub


OPTIONS = [str(FOLDER / "head"), "--repo", REPOSITORY, "--model", TARGET, "--results", str(EVALUATED)]


def test_publish_uploads_one_commit_and_may_be_repeated(remote, tmp_path):
    said = run("publish", *OPTIONS, "--private")
    assert "Not checked: that it drafts" in said and f"https://huggingface.co/{REPOSITORY}/commit/2" in said
    assert remote.private[REPOSITORY] and remote.commits[REPOSITORY] == 2
    assert files_of(remote.folder / REPOSITORY) == WRITTEN
    (remote.folder / REPOSITORY / "model-00001-of-00002.safetensors").write_text("of an earlier version")
    run("publish", *OPTIONS)
    assert files_of(remote.folder / REPOSITORY) == WRITTEN and remote.commits[REPOSITORY] == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--license", "MIT"], "no licence 'MIT'. Did you mean mit"),
        (["--license", "apache2"], "Did you mean apache-2.0"),
        (["--license", "proprietary"], "--license other with --license-name"),
        (["--license", "other"], "needs --license-name and --license-link"),
        (["--license", "other", "--license-name", "My Licence", "--license-link", "LICENSE"], "'My Licence': .*lower"),
        (["--license", "other", "--license-name", "mine", "--license-link", "somewhere"], "'somewhere': expected"),
        (["--license", "other", "--license-name", "mine", "--license-link", "LICENSE"], "LICENSE: there is no such"),
        (["--license", "mit", "--license-name", "mine"], "for --license other, not mit"),
        (["--license-name", "mine"], "go with --license other"),
    ],
)
def test_licences_that_the_hub_refuses(remote, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run("publish", *OPTIONS, *options)
    assert not remote.commits
    if "LICENSE" not in options[-1:]:
        with pytest.raises(ValueError, match=message):
            run("card", *OPTIONS, *options)


def test_a_licence_that_is_not_on_the_list_of_the_hub(remote, tmp_path):
    """Its card says what the Hub asks for, and its text is published with the head."""
    source = tmp_path / "head"
    shutil.copytree(FOLDER / "head", source)
    (source / "LICENSE").write_text("For the weights of this head ...")
    options = ["--license", "other", "--license-name", "my-licence-1.0", "--license-link"]
    run("publish", str(source), *OPTIONS[1:], *options, "LICENSE")
    published = remote.folder / REPOSITORY
    data = ModelCard.load(published / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "my-licence-1.0", "LICENSE")
    assert files_of(published) == sorted([*WRITTEN, "LICENSE"])
    address = "https://example.com/licence"
    assert f"license_link: {address}" in run("card", *OPTIONS, *options, address)
    assert "license" not in ModelCard(run("card", *OPTIONS)).data.to_dict()


def test_push_to_hub_does_the_same(remote, tmp_path):
    _, head, _ = dspark_hf.embedded_pair()
    address = head.push_to_hub(REPOSITORY, target=TARGET, results=EVALUATED, private=True)
    assert address.endswith("/commit/2") and remote.private[REPOSITORY]
    assert files_of(remote.folder / REPOSITORY) == WRITTEN
    run("publish", *OPTIONS[:2], "someone/by-command", *OPTIONS[3:])
    pushed, published = remote.folder / REPOSITORY, remote.folder / "someone/by-command"
    cards = [(folder / "README.md").read_text().replace("by-command", "tiny-head") for folder in (pushed, published)]
    assert cards[0] == cards[1]
    heads = [dspark_hf.DSparkHead.from_pretrained(folder).state_dict() for folder in (pushed, published)]
    assert heads[0].keys() == heads[1].keys() and all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_repositories_that_are_not_overwritten(remote, tmp_path):
    remote.add(REPOSITORY, README__md="my data")
    with pytest.raises(ValueError, match=r"holds other content \(README.md\): choose another --repo"):
        run("publish", *OPTIONS)
    shutil.rmtree(remote.folder / REPOSITORY)
    remote.add(REPOSITORY, config__json='{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="holds other content"):
        run("publish", *OPTIONS)
    shutil.rmtree(remote.folder / REPOSITORY)
    other = json.loads((FOLDER / "head" / "config.json").read_text()) | {"num_hidden_layers": 2}
    other["layer_types"] = other["layer_types"][:2]
    remote.add(REPOSITORY, config__json=json.dumps(other))
    with pytest.raises(ValueError, match=r"another head \(num_hidden_layers 2, here 3\)"):
        run("publish", *OPTIONS)
    with pytest.raises(ValueError, match="exists and is public"):
        run("publish", *OPTIONS, "--private")
    assert files_of(remote.folder / REPOSITORY) == ["config.json"] and remote.commits[REPOSITORY] == 1


def test_an_upload_that_breaks_off_says_so(remote, monkeypatch):
    def broken(*args, **kwargs):
        raise publishing.HTTPError("connection reset")

    monkeypatch.setattr(HfApi, "upload_folder", broken)
    with pytest.raises(OSError, match=r"cannot be reached \(connection reset\). No files were uploaded"):
        run("publish", *OPTIONS)
    assert files_of(remote.folder / REPOSITORY) == []


def test_no_login(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(OSError, match="not logged in to the Hub: run `hf auth login` first. Nothing was uploaded"):
        run("publish", *OPTIONS)


def test_offline_mode(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set: .* Nothing was uploaded") as error:
        run("publish", *OPTIONS)
    assert "hf_secret" not in str(error.value)


def test_no_network(tmp_path):
    """huggingface_hub's own error, as the command shows it; no token is printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret", "HF_ENDPOINT": "http://127.0.0.1:9"}
    code = "from dspark_hf.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "publish", *OPTIONS], env=clean, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "The Hub cannot be reached" in done.stderr and "No files were uploaded" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


def test_what_is_no_publishable_head(hub, tmp_path):
    folder, output = tmp_path / "head", tmp_path / "output"

    def refused(message: str, *options: str, error=ValueError):
        with pytest.raises(error, match=message):
            run("publish", str(folder), "--repo", REPOSITORY, *options, "--dry-run", "--output", str(output))
        assert not output.exists()

    refused("There is no head in", error=OSError)
    target = tiny_target()
    head = tiny_head(target)
    head.save_pretrained(folder)
    refused("Give the Hub id of the target")
    refused("results are of another head than", "--results", str(EVALUATED))
    refused("must be a Hub id, USER/NAME; got 'target'", "--model", "target")
    refused("must be a Hub id, USER/NAME", "--model", str(FOLDER / "target"))
    with pytest.raises(ValueError, match="--repo must be a Hub id"):
        run("publish", str(folder), "--repo", "no-user", "--model", TARGET, "--dry-run", "--output", str(output))
    with pytest.raises(ValueError, match="go together"):
        run("publish", str(folder), "--repo", REPOSITORY, "--model", TARGET, "--dry-run")

    model, trained, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    untrained = dspark_hf.DSparkHead(
        dspark_hf.DSparkConfig.from_target(model.config, num_hidden_layers=1, markov_rank=8)
    )
    with torch.no_grad():
        # The first token is drafted every time, which pads and is never written.
        untrained.norm.weight.zero_()
        untrained.markov_head.markov_w2.weight.zero_()
    untrained.save_pretrained(folder)
    hub(TARGET, FOLDER / "target")
    refused(r"accepted none of \d+ drafts", "--model", TARGET)
    with torch.no_grad():
        untrained.norm.weight[0] = float("nan")
    untrained.save_pretrained(folder)
    refused("no numbers .* in norm.weight", "--model", TARGET)


@pytest.mark.slow
def test_in_a_fresh_environment(tmp_path):
    """In a virtual environment with torch, transformers and what `custom_generate/requirements.txt` names, the call on
    the card gives the tokens of plain generate. The package comes from this checkout, in place of the package index
    that it is not on yet; torch and what else is installed comes from the index that pip uses."""
    environment, home = tmp_path / "venv", tmp_path / "home"
    in_cache(home / "hub", TARGET, FOLDER / "target")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        dry_run(tmp_path / "repository")
    in_cache(home / "hub", REPOSITORY, tmp_path / "repository")
    python = environment / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}

    def call(*args: str) -> str:
        done = subprocess.run(
            [*map(str, args)],
            cwd=tmp_path,
            env=clean | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(sys.executable, "-m", "venv", environment)
    call(python, "-m", "pip", "install", "--quiet", f"torch=={version('torch').partition('+')[0]}")
    call(python, "-m", "pip", "install", "--quiet", "transformers")
    call(python, "-m", "pip", "install", "--quiet", ROOT)
    requirements = tmp_path / "repository" / "custom_generate" / "requirements.txt"
    call(python, "-m", "pip", "install", "--quiet", "--no-index", "-r", requirements)
    script = tmp_path / "script.py"
    script.write_text(FRESH.format(target=TARGET, repository=REPOSITORY, folder=tmp_path / "repository"))
    output = call(python, script)
    print(output)
    assert output.splitlines()[-1] == "same tokens"


FRESH = """
import sys
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{target}", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("{target}")
messages = [{{"role": "user", "content": "Tom has 3 boxes of 12 pencils. How many pencils has he?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
plain = model.generate(**inputs, max_new_tokens=64)
assert "dspark_hf" not in sys.modules
for source in ("{repository}", "{folder}"):
    output = model.generate(
        **inputs, custom_generate=source, trust_remote_code=True, max_new_tokens=64, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == plain.tolist()
    print(f"{{source}}: {{output.dspark.tau:.2f}} tokens a round")
print(sys.modules["dspark_hf"].__file__)
print({{name: version(name) for name in ("torch", "transformers", "huggingface_hub", "dspark-hf")}})
print("same tokens")
"""
