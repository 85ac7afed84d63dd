"""Run the command line as ``python -m permllm_offline``."""

from permllm_offline.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
