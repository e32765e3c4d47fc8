"""`batch` as a command with a sub-command: `batch JOB ...` runs a job, `batch status OUTPUT` looks at one."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class BatchGroup(TyperGroup):
    """A command with arguments of its own, unless the first argument is the name of a sub-command."""

    allow_extra_args = False
    allow_interspersed_args = True  # options may follow arguments, as in any other command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args and args[0] in self.commands:
            return self.commands[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)
