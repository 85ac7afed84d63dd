"""Upload a checkpoint to the Hugging Face hub: the one place that writes to a network."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.report.published import publish
from permllm_offline.run.local_path import local_path
from permllm_vllm.checkpoint.schema import QUANT_METHOD
from permllm_vllm.checkpoint.shards import CONFIG_NAME

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_OF_NEW_REPOSITORIES = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
"""What a repository holds that somebody made on the website and put nothing into."""


def check_push(repository: str, model: str) -> None:
    """Ask the hub whether somebody is logged in, and check the target, before hours of work.

    Whether they may write to ``repository`` shows only when they do.

    Args:
        repository: to upload to.
        model: that is pruned, as its user names it.

    Raises:
        OfflineError: the name is none, or that of the model, or of a repository with other things
            in it; or nobody is logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    try:
        validate_repo_id(repository)
        owner = (api.whoami() or {}).get("name", "")
        target = repository if "/" in repository else f"{owner}/{repository}"
        files = _files(api, target)
        ours = CONFIG_NAME in files and _is_ours(api, target)
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"--push-to-hub {repository!r} cannot work ({first_line(error)}). Give owner/name, "
            "unset HF_HUB_OFFLINE, and log in with `hf auth login`."
        ) from error
    if target.casefold() == model.casefold() and not local_path(model).is_dir():
        raise OfflineError(
            f"--push-to-hub {repository!r} is the model that is pruned, whose weights the upload "
            "would take away: give another owner/name."
        )
    if not ours and (others := sorted(files - _OF_NEW_REPOSITORIES)):
        raise OfflineError(
            f"--push-to-hub {repository!r} is no permllm checkpoint and holds {others[0]}: an "
            "upload replaces nothing but such a checkpoint. Give a new owner/name, or an empty "
            "repository."
        )


def push(directory: Path, repository: str) -> str:
    """Upload a checkpoint folder; a repository that does not exist yet is made private.

    Args:
        directory: the folder, complete. What it says of folders of this machine stays here.
        repository: ``owner/name``, or the name alone of one of whoever is logged in.

    Returns:
        The address of the commit.

    Raises:
        OfflineError: the upload failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        target = api.create_repo(repository, private=True, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as published:
            publish(directory, Path(published))
            commit = api.upload_folder(
                repo_id=target,
                folder_path=published,
                delete_patterns=_WEIGHTS,  # of what was there before
                commit_message="Upload a checkpoint of permllm-offline prune",
            )
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"the checkpoint is complete in {directory}, but was not uploaded to {repository!r} "
            f"({first_line(error)}). Upload it with: "
            f"python -c {shlex.quote(_again(directory, repository))}"
        ) from error
    return str(commit.commit_url)


def _again(directory: Path, repository: str) -> str:
    """Python that uploads what ``push`` does: no folder of this machine is named in it."""
    called = f"push(Path({str(directory)!r}), {repository!r})"
    return f"from pathlib import Path; from permllm_offline.hub import push; print({called})"


def _files(api: Any, repository: str) -> set[str]:
    """Names of the files of a repository; none where it is not there yet."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return set(api.list_repo_files(repository))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return set()


def _is_ours(api: Any, repository: str) -> bool:
    """Whether the configuration in a repository is that of a permllm checkpoint."""
    file = api.hf_hub_download(repository, CONFIG_NAME)
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (ValueError, LookupError, TypeError):
        return False
