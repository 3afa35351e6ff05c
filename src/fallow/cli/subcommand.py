"""A command that has another one beneath it, whose name can be its first argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


def with_subcommand(name: str, function: Callable[..., None], epilog: str) -> type[TyperCommand]:
    """The class of a command that hands over to ``function`` where its first argument is ``name``."""
    beneath = typer.Typer(
        add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
    )
    beneath.command(name, epilog=epilog)(function)

    class Command(TyperCommand):
        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            if args[:1] == [name]:
                command = typer.main.get_command(beneath)
                return command.make_context(f"{info_name} {name}", args[1:], parent, **extra)
            return super().make_context(info_name, args, parent, **extra)

    return Command
