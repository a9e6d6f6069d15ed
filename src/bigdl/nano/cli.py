"""The ``bigdl`` command. Arguments in, words out; the work is done elsewhere.

Exit codes: 0 done, 1 failed or a problem found, 2 wrong usage.
"""

# Annotations are evaluated here: typer reads them, and it is imported inside a function.

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bigdl import __version__
from bigdl._base.errors import BigDLError, MissingDependencyError
from bigdl._base.optional import need
from bigdl._base.registry import nearest

if TYPE_CHECKING:
    from bigdl.nano.doctor import Diagnosis

__all__ = ["main"]

_DONE, _FAILED, _WRONG_USAGE, _INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        arguments: What follows ``bigdl``; None takes it from the command line.

    Raises:
        SystemExit: Always, with the exit code; or with the line to install as its message where
            the ``[cli]`` extra is missing.
    """
    try:
        need("typer", extra="cli", purpose="The bigdl command")
        need("rich", extra="cli", purpose="The bigdl command")
    except MissingDependencyError as exc:
        raise SystemExit(str(exc)) from None
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    """Run the command; errors become one line on stderr and an exit code."""
    import typer

    # click, or typer's own copy of it: either way the parent of BadParameter
    usage_error: Any = typer.BadParameter.__base__
    app = _app()
    try:
        code = app(arguments or ["--help"], prog_name="bigdl", standalone_mode=False)
    except usage_error as exc:
        return _complain(_one_line(exc.format_message()) + _suggestion(exc), _WRONG_USAGE)
    except BigDLError as exc:
        return _complain(_one_line(str(exc)), _FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # the reader has seen enough, as in "bigdl doctor | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    return code if arguments else _WRONG_USAGE


def _complain(text: str, code: int) -> int:
    sys.stderr.write(f"bigdl: {text}\n")
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _suggestion(exc: Any) -> str:
    """The nearest command, for a wrong one, where the text does not name one yet."""
    text, context = exc.format_message(), exc.ctx
    if "Did you mean" in text or "No such command" not in text or context is None:
        return ""
    wrong = text.partition("'")[2].partition("'")[0]
    return nearest(wrong, context.command.list_commands(context))


def _app() -> Any:
    """The commands. Made when called, so that importing this module needs no extra."""
    import typer

    from bigdl.nano.launch import planned

    app = typer.Typer(
        name="bigdl",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Example: bigdl doctor",
    )

    @app.callback(invoke_without_command=True)
    def bigdl(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Seamless scaling of AI pipelines, from a laptop to a cluster."""
        if version:
            typer.echo(__version__)
            raise typer.Exit

    @app.command(epilog="Example: bigdl doctor --json > machine.json")
    def doctor(
        as_json: Annotated[
            bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")
        ] = False,
        time_limit: Annotated[
            float, typer.Option(min=1, help="Seconds for each import and each run.")
        ] = 120.0,
    ) -> None:
        """Show what this machine has and what runs on it.

        Every accelerator really runs a small model, in a process of its own.

        Exits with 1 if something that is installed does not work.
        """
        raise typer.Exit(_doctor(as_json=as_json, time_limit_s=time_limit))

    # everything behind SCRIPT is the script's, options too
    @app.command(
        epilog="Example: bigdl launch -n 2 train.py --epochs 3",
        context_settings={"allow_interspersed_args": False},
    )
    def launch(
        script: Annotated[
            Path,
            typer.Argument(metavar="SCRIPT", exists=True, dir_okay=False, help="A Python file."),
        ],
        arguments: Annotated[
            list[str] | None, typer.Argument(metavar="[ARGS]...", help="Its own arguments.")
        ] = None,
        processes: Annotated[
            int, typer.Option("-n", "--num-processes", min=1, help="How many processes.")
        ] = 1,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Show what would be started, and start nothing.")
        ] = False,
    ) -> None:
        """Run a Python script in several processes of this machine.

        Each has cores of its own and as many threads, and finds RANK, WORLD_SIZE, LOCAL_RANK,
        MASTER_ADDR and MASTER_PORT in its environment, as torch.distributed reads them.

        The first that fails ends the others, and its exit code is this command's.
        """
        found = planned(processes, script, arguments or [])
        if dry_run:
            typer.echo(found.shown())
            raise typer.Exit
        raise typer.Exit(found.run(sys.stdout.buffer, sys.stderr.buffer))

    return app


# --- doctor -----------------------------------------------------------------------------------


def _doctor(*, as_json: bool, time_limit_s: float) -> int:
    from rich.console import Console

    from bigdl.nano.doctor import diagnose

    with Console(stderr=True).status("looking") as status:
        found = diagnose(time_limit_s=time_limit_s, progress=status.update)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
    else:
        _show(found)
    return _FAILED if found.has_problem else _DONE


def _show(found: "Diagnosis") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bigdl.nano.doctor import PACKAGES

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # for files and pipes: lines are for grep, not for a screen

    def table(title: str, *headings: str, rows: Iterable[tuple[str, ...]]) -> None:
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in headings:
            grid.add_column(heading, overflow="fold")
        for row in rows:
            grid.add_row(*map(Text, row))  # as Text: brackets are no markup
        console.print(grid, "")

    table("This machine", "", "", rows=found.machine.rows().items())
    versions = [
        (package, version or f"not installed; pip install 'bigdl-next[{PACKAGES[package][1]}]'")
        for package, version in found.versions.items()
    ]
    table("Versions", "", "", rows=versions)
    if found.runs:
        rows = [
            (
                run.method,
                run.status,
                "" if run.latency_ms is None else f"{run.latency_ms:.2f}",
                "" if run.error is None else f"{run.error:.1e}",
                run.reason,
            )
            for run in found.runs
        ]
        table("A small model", "method", "status", "ms", "error", "why not", rows=rows)
    for finding in found.findings:
        console.print(Text(f"{finding.kind}: {finding.what}"), soft_wrap=True)
        console.print(Text(f"  fix: {finding.fix}"), soft_wrap=True)
    if not found.has_problem:
        console.print("No problem found: everything that is installed works.")
