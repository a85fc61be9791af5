# SPDX-License-Identifier: Apache-2.0
"""``zipserv doctor``."""

from __future__ import annotations

import click
from rich.console import Console
from rich.text import Text

from .output import Code, emit, json_option

_MARKS = {"ok": ("ok", "green"), "note": ("--", "yellow"), "problem": ("!!", "bold red")}


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Tell what was found on this machine and what to do about what is missing.

    Exit code 5 where something that is needed does not work.
    """
    from ..doctor import examine  # not at the top: it must also report a package that cannot be imported

    findings = examine()
    problems = [finding for finding in findings if finding.state == "problem"]
    if as_json:
        emit({"ok": not problems, "command": "doctor", "findings": [finding.as_dict() for finding in findings]})
        return Code.MISSING if problems else Code.OK
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark, style = _MARKS[finding.state]
        line = Text(f"{mark}  ", style=style)
        line.append(f"{finding.what:{width}}  {finding.found}", style="default")
        console.print(line)
        if finding.cure:
            console.print(Text(f"{'':{width + 4}}  -> {finding.cure}", style="cyan"))
    return Code.MISSING if problems else Code.OK
