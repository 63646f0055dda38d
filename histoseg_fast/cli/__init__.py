"""The command line: `histoseg-fast COMMAND`. Each command is a small module that parses, calls the library, prints."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from histoseg_fast import __version__
from histoseg_fast.cli import (
    bench,
    compile,
    demo,
    doctor,
    evaluate,
    experiments,
    export,
    infer,
    inspect,
    log,
    merge,
    report,
    train,
)
from histoseg_fast.errors import HistosegError, UsageError

app = typer.Typer(
    name="histoseg-fast",
    help="H&E histology images to cancer / stroma / background maps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (infer, merge, report, demo, inspect, doctor, compile, evaluate, train, experiments, export, bench):
    app.command(module.NAME)(module.command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(f"histoseg-fast {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some inputs failed, 130 and 143 interrupted."""
    # Under a daemon the streams may be closed, and then are None.
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show is no failure
    log.use("text")
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except HistosegError as error:
        code = 2 if isinstance(error, UsageError) else 1
        _say(str(error), code)
    except BrokenPipeError:  # the reader of our output has gone; there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError:
        code = 1
        _say("there is not enough memory; free some, or give it more", code)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's own: wrong options and the like
            error.show()
            code = error.exit_code
        elif os.environ.get("HISTOSEG_TRACEBACK"):
            raise
        else:
            code = 1
            what = f"unexpected {type(error).__name__}: {error}"
            _say(f"{what}; set HISTOSEG_TRACEBACK=1 to see where, and report it", code)
    sys.exit(code)


def _say(text: str, code: int) -> None:
    log.write("error", "error", f"histoseg-fast: {text}", exit_code=code)
