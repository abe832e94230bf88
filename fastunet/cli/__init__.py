"""The command line of fastunet: a module a group of commands, and how errors end."""

import os
import signal
import sys

from . import apply, convert, tools, train  # each adds its commands to the application
from .common import app

_ENDING = (signal.SIGINT, signal.SIGTERM)


def _terminate(number: int, _: object) -> None:
    """Say so once and unwind, so that no half-written file is left behind."""
    if _is_first():
        sys.stderr.write("fastunet: interrupted\n")
    sys.exit(128 + number)


def _is_first() -> bool:
    """Whether this is the one process, or the first of several, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line: user errors end in one line and exit code 2, without a traceback."""
    from ..backends import keep_freed_memory
    from ..distributed import ProcessLostError

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    keep_freed_memory()
    before = {number: signal.signal(number, _terminate) for number in _ENDING}
    try:
        status = app(arguments, standalone_mode=False)
    except Exception as error:
        # the class of usage errors is typer's own in new versions and click's in old ones
        usage = getattr(error, "format_message", None)
        expected = (ValueError, TypeError, OSError, ModuleNotFoundError, MemoryError)
        if debug or not (usage or isinstance(error, expected)):
            raise
        one_line = " ".join((usage() if usage else str(error)).split()) or type(error).__name__
        speaks = _is_first() or isinstance(error, ProcessLostError)
        if speaks:
            sys.stderr.write(f"fastunet: error: {one_line}\n")
        # torchrun ends the others as soon as one fails: none shall before the first has spoken
        status = 2 if speaks else 0
        if isinstance(error, ProcessLostError):
            # threads of gloo that still wait for the other process abort an orderly exit
            sys.stderr.flush()
            os._exit(status)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(status)


__all__ = ["apply", "convert", "main", "tools", "train"]
