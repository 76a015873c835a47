"""The commands' own argparse: what is wrong with a command line is said as everything else is, in one sentence."""

import argparse
from typing import NoReturn

from pact_tune.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message, which names the words that are wrong or missing."""
        raise UserError(f"{message}; see `{self.prog} --help`.")
