"""The command line: ``permllm-offline``, or ``python -m permllm_offline``.

What the libraries read from the environment when they are imported is decided here.
"""

import os

from permllm_offline.openmp import let_threads_sleep


def main() -> int:
    """Run the command line; returns the exit status."""
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # progress is that of the first process
    let_threads_sleep(os.environ)
    from permllm_offline import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
