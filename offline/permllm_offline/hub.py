"""Upload a checkpoint to the Hugging Face hub: the one place that writes to a network."""

from __future__ import annotations

import shlex
from pathlib import Path

from permllm_offline.errors import OfflineError, first_line

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repository: str) -> None:
    """Ask the hub whether somebody is logged in, and check the name, before hours of work.

    Whether they may write to ``repository`` shows only when they do.

    Raises:
        OfflineError: the name is none, or nobody is logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"--push-to-hub {repository!r} cannot work ({first_line(error)}). Give owner/name, "
            "unset HF_HUB_OFFLINE, and log in with `hf auth login`."
        ) from error


def push(directory: Path, repository: str) -> str:
    """Upload a checkpoint folder; a repository that does not exist yet is made private.

    Args:
        directory: the folder, complete.
        repository: ``owner/name``.

    Returns:
        The address of the commit.

    Raises:
        OfflineError: the upload failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            delete_patterns=_WEIGHTS,  # of what was there before
            commit_message="Upload a checkpoint of permllm-offline prune",
        )
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"the checkpoint is complete in {directory}, but was not uploaded to {repository!r} "
            f"({first_line(error)}). Upload it with "
            f"`hf upload {repository} {shlex.quote(str(directory))}`."
        ) from error
    return str(commit.commit_url)
