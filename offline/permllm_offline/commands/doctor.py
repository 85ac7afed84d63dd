"""``permllm-offline doctor``: what this environment can do, and how to get what is missing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from permllm_offline.commands.json_file import add_json_option, check_json, write_json
from permllm_offline.commands.tables import show
from permllm_vllm.diagnosis import Finding, Service, Verdict, diagnose, services

_EXAMPLES = """examples:
  permllm-offline doctor
  permllm-offline doctor --json doctor.json
"""
_STYLES = {Verdict.GOOD: "green", Verdict.NOTE: "yellow", Verdict.PROBLEM: "bold red"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="show what this environment can prune and serve with, and what is missing",
        description="Look at the processor, the GPU, the installed versions, the compiled kernels "
        "and vLLM's view of the plugin. The exit status is 1 if there is a problem.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json_option(parser, "the findings")
    return parser


def run(options: argparse.Namespace) -> int:
    """Show the findings, and write them where asked."""
    check_json(options.json)
    findings, served = diagnose(), services()
    problems = sum(finding.verdict is Verdict.PROBLEM for finding in findings)
    show(_findings_table(findings), _services_table(served), f"{problems} problems")
    record = {
        "findings": [asdict(one) | {"verdict": one.verdict.value} for one in findings],
        "services": [asdict(one) for one in served],
        "problems": problems,
    }
    write_json(options.json, record)
    return 1 if problems else 0


def _findings_table(findings: list[Finding]) -> Table:
    table = Table(title="environment", show_lines=False)
    for column in ("", "found", "verdict", "remedy"):
        table.add_column(column, overflow="fold")
    for one in findings:
        verdict = Text(one.verdict.value, style=_STYLES[one.verdict])
        table.add_row(one.subject, Text(one.found), verdict, Text(one.remedy))
    return table


def _services_table(served: list[Service]) -> Table:
    table = Table(title="what would multiply")
    for column in ("device", "dtype", "backend", "instruction set", "why not a faster one"):
        table.add_column(column, overflow="fold")
    for one in served:
        table.add_row(one.device, one.dtype, one.backend, one.instruction_set, Text(one.reason))
    return table
