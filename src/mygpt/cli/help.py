"""Help pages as plain text: commands in groups, and of many options the first ones first.

Options without a panel are those that people need first: `--help` lists them, `--help-all` lists
all. Lines are broken at words, at 80 columns or the terminal's width.
"""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from typer.core import TyperCommand, TyperGroup

from mygpt.cli.usage import GIVEN, see_help
from mygpt.errors import InputError

HELP_NAMES = ["-h", "--help", "--help-all"]
_FIRST, _ARGUMENTS, _COMMANDS = "Options", "Arguments", "Commands"
_ALL = "mygpt.help_all"  # whether all options are listed
# What stands for an option's value, by a part of its type's name; else TEXT.
_METAVARS = (("int", "N"), ("float", "X"), ("Path", "PATH"))
_LEAST_WIDTH, _MOST_WIDTH = 40, 80  # columns of a page
_MOST_NAMES = 24  # columns of names beside which their description begins

Panels = dict[str, list[tuple[str, str]]]


class Command(TyperCommand):
    """A command. Its options are grouped by their panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, as click does.

        Raises:
            InputError: for arguments that belong to nothing, unless the context allows them.
        """
        ctx.meta[_ALL] = HELP_NAMES[-1] in args
        ctx.meta[GIVEN] = list(args)
        may_have_more, ctx.allow_extra_args = ctx.allow_extra_args, True
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # the parser of options does not set it
                error.ctx = ctx  # type: ignore[attr-defined]
            raise
        if rest and not may_have_more and not ctx.resilient_parsing:
            raise InputError(f"unexpected argument {' '.join(rest)!r:.80}: {see_help(ctx)}")
        return rest

    @property
    def help_name(self) -> str:
        """The option that lists all options."""
        has_panels = any(getattr(param, "rich_help_panel", None) for param in self.params)
        return HELP_NAMES[-1] if has_panels else "--help"

    def get_help(self, ctx: Any) -> str:
        """The help page."""
        panels: Panels = {_ARGUMENTS: [], _FIRST: []}
        for panel, row in _rows(self, ctx):
            panels.setdefault(panel, []).append(row)
        further = list(panels)[2:]
        panels[_FIRST].append(("-h, --help", "Show this page."))
        if further and not ctx.meta.get(_ALL):
            count = sum(len(panels.pop(panel)) for panel in further)
            listed = ", ".join(panel[0].lower() + panel[1:] for panel in further)
            panels[_FIRST].append((HELP_NAMES[-1], f"Show {count} more options: {listed}."))
        return _page(self, ctx, panels)


class Group(TyperGroup):
    """A group of commands, which are listed by their panels."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names.

        Raises:
            InputError: for an unknown one, with the nearest names.
        """
        name, known = args[0], self.list_commands(ctx)
        if name in known or name.startswith("-"):
            return super().resolve_command(ctx, args)
        alike = [each for each in known if each.startswith(name)]
        alike = alike or difflib.get_close_matches(name, known, n=3)
        meant = f"did you mean {' or '.join(alike)}? " if alike else ""
        listed = f"`{ctx.command_path} --help` lists them"
        raise InputError(f"there is no command {name!r:.40}: {meant}{listed}")

    def get_help(self, ctx: Any) -> str:
        """The help page."""
        panels: Panels = {}
        width = max(map(len, self.list_commands(ctx)))
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panel = command.rich_help_panel or _COMMANDS
            first_sentence = re.split(r"(?<=\.)\s", command.help or "", maxsplit=1)[0]
            panels.setdefault(panel, []).append((f"{name:<{width}}", first_sentence))
        for panel, row in _rows(self, ctx):
            panels.setdefault(panel, []).append(row)
        page = f"Show this page; `{ctx.command_path} COMMAND --help` shows a command's."
        panels.setdefault(_FIRST, []).append(("-h, --help", page))
        return _page(self, ctx, panels)


def _page(command: Any, ctx: Any, panels: Panels) -> str:
    """The usage line, the description, a list for each panel, and the last words."""
    width = max(_LEAST_WIDTH, min(_MOST_WIDTH, shutil.get_terminal_size().columns))
    usage = " ".join(piece.strip("{}").upper() for piece in command.collect_usage_pieces(ctx))
    paragraphs = (command.help or "").split("\n\n")
    parts = [f"Usage: {ctx.command_path} {usage}"]
    parts += [_wrapped(" ".join(each.split()), width, "  ") for each in paragraphs]
    for panel, rows in panels.items():
        if rows:
            parts.append("\n".join([f"{panel}:", *_list(rows, width)]))
    if command.epilog:
        parts.append(_wrapped(command.epilog, width, "  "))
    return "\n\n".join(parts)


def _list(rows: list[tuple[str, str]], width: int) -> Iterator[str]:
    """Names, and their descriptions in a column beside them."""
    column = min(_MOST_NAMES, max(len(names) for names, _ in rows)) + 4
    for names, description in rows:
        text = _wrapped(description, width, " " * column)
        if len(names) <= column - 4:
            yield f"  {names:<{column - 2}}{text.removeprefix(' ' * column)}".rstrip()
        else:
            yield f"  {names}"
            yield text


def _wrapped(text: str, width: int, indent: str) -> str:
    """Lines of at most `width` columns; a word that has a hyphen is not broken."""
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _rows(command: Any, ctx: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """The panel of each argument and option, and its row: names, and description."""
    kinds = get_type_hints(command.callback)
    own = command.get_help_option(ctx)
    for param in command.get_params(ctx):
        if param is own or getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            yield _ARGUMENTS, ((param.metavar or param.name).upper(), _description(param))
            continue
        names = ", ".join(sorted(param.opts, key=len))
        if param.secondary_opts:
            names = f"--[no-]{param.opts[0].removeprefix('--')}"
        elif not param.is_flag:
            kind = str(kinds.get(param.name))
            usual = next((name for part, name in _METAVARS if part in kind), "TEXT")
            names += f" {param.metavar or usual}"
        yield param.rich_help_panel or _FIRST, (names, _description(param))


def _description(param: Any) -> str:
    """The help text, with the default in the same style as in texts that describe it."""
    parts, default = [param.help or ""], param.default
    if param.required:
        parts.append("Required.")
    if getattr(param, "secondary_opts", None) and param.show_default:
        default = param.opts[0] if default else param.secondary_opts[0]
    if param.show_default and default not in (None, "", False):
        parts.append(f"Default: {default}.")
    if param.envvar:
        parts.append(f"Environment variable: {param.envvar}.")
    return " ".join(parts)
