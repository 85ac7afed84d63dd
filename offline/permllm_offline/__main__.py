"""Run the command line as ``python -m permllm_offline``."""

import os

if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # progress is that of the first process; read at import
    from permllm_offline.cli import main

    raise SystemExit(main())
