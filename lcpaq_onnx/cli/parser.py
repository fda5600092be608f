"""argparse with manners: a mistake is one UsageError that names the nearest option, and every help has examples."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from lcpaq_onnx.cli.console import Console
from lcpaq_onnx.errors import UsageError

__all__ = ["Command", "CommandGroup", "Parser", "new_parser"]

Command = Callable[[argparse.Namespace, Console], int]
"""What a command does; returns the exit code."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving the process. Made by ``new_parser`` and ``CommandGroup.add``."""

    children: Mapping[str, Parser] = MappingProxyType({})
    """Commands by name; none in a leaf."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises UsageError; the nearest option is named even where a required one is missing because of the typo."""
        leaf, words = self, list(argv)
        while words and words[0] in leaf.children:
            leaf = leaf.children[words.pop(0)]
        if not leaf.children:
            leaf._check_options(words)
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError; a wrong choice gets the nearest one."""
        choice = re.search(r"invalid choice: '?([^'\s]*)'?.* \(.*choose from (.*)\)", message)
        known = re.findall(r"[\w.-]+", choice[2]) if choice is not None else ()
        raise self._usage_error(message, choice[1] if choice is not None else "", known)

    def _check_options(self, words: Sequence[str]) -> None:
        # argparse has no public list of its options.
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in words:
            name = word.split("=", 1)[0]
            if name == "--":
                return
            if name.startswith("--") and name not in known:
                raise self._usage_error(f"unknown option '{name}'", name, known)

    def _usage_error(self, message: str, word: str, known: Collection[str]) -> UsageError:
        where = "".join(f"{part}: " for part in self.prog.split(" ", 1)[1:])
        near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
        guess = f"did you mean '{near[0]}'? " if near else ""
        return UsageError(f"{where}{message}", hint=f"{guess}see `{self.prog} --help`")


class CommandGroup:
    """The commands of one parser."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._children: dict[str, Parser] = {}
        parser.children = self._children
        self._commands = parser.add_subparsers(
            metavar="COMMAND", required=True, prog=parser.prog, parser_class=Parser, title="commands"
        )

    def add(self, name: str, summary: str, epilog: str, command: Command | None = None) -> Parser:
        """A parser for ``name``; ``summary`` is one line, ``epilog`` says what is written and shows examples.

        Options are never abbreviated: a script must not break when a longer option is added.
        """
        child: Parser = self._commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if command is not None:
            child.set_defaults(command=command)
        self._children[name] = child
        return child


def new_parser(prog: str, description: str, epilog: str) -> Parser:
    """The root."""
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
