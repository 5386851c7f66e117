"""A head's repository for the Hub: what is in one, checks before it is uploaded, and the upload."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoints.files import RESULTS, open_checkpoint
from ..configuration_dspark import DSparkConfig
from ..modeling_dspark import DSparkHead
from . import licenses
from .licenses import License, as_license

CUSTOM_GENERATE = Path(__file__).parent / "custom_generate"
# The files of a head that are published; logs, checkpoints and whatever else is in its folder are not.
HEAD_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *licenses.FILES)
OUR_FILES = ("README.md", RESULTS, "custom_generate/generate.py", "custom_generate/requirements.txt")
# Fields in which two versions of one head agree.
SAME = ("block_size", "vocab_size", "hidden_size", "num_target_layers", "target_layer_ids", "num_hidden_layers")
CHECKED_TOKENS = 32
# What every failed request raises; huggingface_hub has it from httpx, and from version 2 on from httpx2.
HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

# -- Building ---------------------------------------------------------------------------------------------------------


def build(
    source: str | Path,
    repository: str,
    output: str | Path,
    target: str | None = None,
    results: str | Path | None = None,
    license: str | License | None = None,
) -> str:
    """Write the repository of a head into a folder, and check it there: its weights and config, the card, what
    `custom_generate` needs and the results of its evaluation.

    Args:
        source: folder of the head. repository: Hub id that it will have. output: a new or empty folder, or one that an
            earlier call wrote, which is replaced.
        target: Hub id of its target; by default the one that the results or the head's config name. Where the results
            are of a folder, that is what the head is tried with.
        results: what `dspark-hf eval` wrote; by default `eval_results.json` in the folder, if it is there.
        license: an identifier that the Hub knows, or a `License`.

    Returns:
        what was checked and what could not be, in sentences.

    Raises:
        ValueError: for ids that are none, a licence that the Hub refuses, results of another head, a head that does not
            draft, or a folder that holds other files. OSError: for files that are missing.
    """
    from ..evaluation.results import check_results, read_results
    from .cards import card_of, render

    source, output = Path(source), Path(output)
    _check_id(repository, "--repo")
    license = as_license(license)
    if license is not None and license.link in licenses.FILES and not (source / license.link).is_file():
        raise OSError(f"--license-link {license.link}: there is no such file in {str(source)!r}.")
    if not (source / "config.json").is_file():
        raise OSError(f"There is no head in {str(source)!r}: it has no config.json.")
    head, found, evaluated = DSparkHead.from_pretrained(source, dtype="auto"), None, None
    if results is None and (source / RESULTS).is_file():
        results = source / RESULTS
    if results is not None:
        found = read_results(results)
        check_results(found, head, str(source))
        evaluated = found["target"]
        target = target or evaluated
    target = target or head.config.target_name_or_path
    if target is None:
        raise ValueError("Give the Hub id of the target (--model), or results of an evaluation, which name it.")
    _check_id(target, "The target's id, which the card and its snippets name (--model),")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if open_checkpoint(source).weights is None:
            _copy_head(source, folder)
        else:
            # Of a checkpoint that is its target's too the head alone.
            head.save_pretrained(folder)
        _write_custom_generate(folder, repository)
        if found is not None:
            # Others cannot do anything with the folders of this machine.
            found |= {"head": repository, "target": target}
            (folder / RESULTS).write_text(json.dumps(found, indent=2) + "\n")
        training = _curve_of(source)
        card = card_of(head, repository, target, results=found, license=license, training=training)
        (folder / "README.md").write_text(str(render(card)), encoding="utf-8")
        checked = check(folder, target, evaluated if evaluated and Path(evaluated).is_dir() else None)
        _replace(output, folder)
    return checked


def _curve_of(source: Path) -> dict | None:
    """What `dspark-hf train` wrote of the run that made a head; `None` where there is nothing of it."""
    path = source / "training.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if content.get("curve") else None


def _check_id(name: str, what: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{what} must be a Hub id, USER/NAME; got {name!r}.") from error
    if name.count("/") != 1 or Path(name).is_dir():
        raise ValueError(f"{what} must be a Hub id, USER/NAME; got {name!r}.")


def _copy_head(source: Path, folder: Path) -> None:
    paths = [path for pattern in HEAD_FILES for path in source.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in paths):
        raise OSError(
            f"There are no weights in {str(source)!r}: no .safetensors file. Other formats are not published."
        )
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def _write_custom_generate(folder: Path, repository: str) -> None:
    (folder / "custom_generate").mkdir()
    for path in (CUSTOM_GENERATE / "generate.py", CUSTOM_GENERATE / "requirements.txt"):
        text = path.read_text(encoding="utf-8").replace("USER/NAME", repository)
        (folder / "custom_generate" / path.name).write_text(text, encoding="utf-8")


def _replace(output: Path, built: Path) -> None:
    """Put what was built into a folder, in place of an earlier build but of nothing else."""
    old = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    others = [str(path) for path in old if not any(path.match(pattern) for pattern in HEAD_FILES + OUR_FILES)]
    if others or (old and Path("custom_generate/generate.py") not in old):
        raise ValueError(
            f"{str(output)!r} holds other files ({', '.join(others or map(str, old))}): give a new folder."
        )
    for path in old:
        (output / path).unlink()
    shutil.copytree(built, output, dirs_exist_ok=True)


def check(folder: Path, target: str, local: str | None = None) -> str:
    """Load a head and draft with it, if its target is on this machine (it is not downloaded for this).

    Args:
        local: a folder of the target.

    Returns:
        what was checked and what was not, in a sentence.

    Raises:
        ValueError: when the head does not load, or none of its drafts is accepted.
    """
    head = DSparkHead.from_pretrained(folder, dtype="auto").eval()
    broken = [name for name, tensor in head.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"The head holds values that are no numbers (NaN, infinity) in {', '.join(broken[:4])}.")
    try:
        local = local or snapshot_download(target, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(local, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(local)
    except OSError:
        return f"The head loads. Not checked: that it drafts, as its target {target} is not on this machine."
    from ..evaluation.bench import schedule_of
    from ..evaluation.prompts import DEFAULT_PROMPTS, encode

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, head = model.to(device), head.to(device, model.dtype)
    inputs = encode(list(DEFAULT_PROMPTS), tokenizer, model.device)
    with schedule_of(head, "whole"):
        options = {"max_new_tokens": CHECKED_TOKENS, "do_sample": False, "return_dict_in_generate": True}
        stats = model.generate(**inputs, **options, assistant_model=head).dspark
    if not sum(stats.accepted):
        raise ValueError(
            f"The head loads, but {target} accepted none of {sum(stats.drafted)} drafts. Was it trained for this model?"
        )
    return f"The head loads and drafts for {target}: {stats.tau:.2f} tokens a round on {len(DEFAULT_PROMPTS)} prompts."


# -- Uploading --------------------------------------------------------------------------------------------------------


def publish(
    source: str | Path,
    repository: str,
    target: str | None = None,
    results: str | Path | None = None,
    license: str | License | None = None,
    private: bool = False,
    message: str = "Upload a draft head with dspark-hf",
) -> tuple[str, str]:
    """Build a head's repository and upload it in one commit, with the token of huggingface_hub's login. Arguments as in
    [`build`]; a repository that holds this head already gets a new version of it.

    Returns:
        what was checked, and the address of the commit.

    Raises:
        ValueError, OSError: see [`build`]; and without login or network, and when the repository holds something else.
            Nothing is uploaded then.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repository"
        checked = build(source, repository, folder, target, results, license)
        api = HfApi()
        with _errors_of_the_hub(repository):
            api.whoami()
            parent = _check_repository(api, repository, folder, private)
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                parent_commit=parent,
                # Weights of an earlier version in more or fewer files.
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
    return checked, commit.commit_url


def publish_head(head: DSparkHead, repository: str, **kwargs: Any) -> str:
    """[`publish`] for a head in memory; the address of the commit."""
    with tempfile.TemporaryDirectory() as scratch:
        head.save_pretrained(scratch)
        return publish(scratch, repository, **kwargs)[1]


def _check_repository(api: HfApi, repository: str, folder: Path, private: bool) -> str | None:
    """The commit that the repository is at, `None` where there is no repository yet.

    Raises:
        ValueError: when it holds something else than this head, or is public though `private` was asked for.
    """
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise ValueError(
            f"{repository} exists and is public: make it private on the Hub first, or leave out --private."
        )
    files = sorted({file.rfilename for file in info.siblings or ()} - {".gitattributes"})
    if not files:
        return info.sha
    other = f"{repository} exists and holds other content ({', '.join(files[:4])}): choose another --repo."
    if "config.json" not in files:
        raise ValueError(other)
    with tempfile.TemporaryDirectory() as scratch:
        api.hf_hub_download(repository, "config.json", revision=info.sha, local_dir=scratch)
        try:
            theirs = DSparkConfig.from_pretrained(scratch)
        except (ValueError, TypeError) as error:
            raise ValueError(other) from error
    ours = DSparkConfig.from_pretrained(folder)
    fields = [(key, getattr(theirs, key), getattr(ours, key)) for key in SAME]
    changed = [f"{key} {there}, here {here}" for key, there, here in fields if there != here]
    if changed:
        raise ValueError(f"{repository} exists and holds another head ({'; '.join(changed)}): choose another --repo.")
    return info.sha


@contextmanager
def _errors_of_the_hub(repository: str) -> Iterator[None]:
    """What can go wrong on the way to the Hub, each with one message that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError("You are not logged in to the Hub: run `hf auth login` first. Nothing was uploaded.") from error
    except OfflineModeIsEnabled as error:
        raise OSError("HF_HUB_OFFLINE is set: unset it to upload. Nothing was uploaded.") from error
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise OSError(f"The Hub refused {repository}: {reason}. No files were uploaded.") from error
    except HTTPError as error:  # type: ignore[misc]
        raise OSError(f"The Hub cannot be reached ({error}). No files were uploaded; try again.") from error
