"""The command `ezmia`. Bad input gets one clear line on standard error and exit code 2.

A crash exits with 3, never with 1, which says that a model is over its budget.
"""

import sys
import traceback
from pathlib import Path
from typing import Annotated

from ezmia_callbacks.errors import AuditError, AuditMemoryError, NonFiniteLogitsError

try:
    import rich  # noqa: F401 - typer alone would do for the help, not for the tables
    import typer
except ImportError:
    sys.exit('The command needs typer and rich: pip install "ezmia-callbacks[huggingface,report]"')

from ezmia_callbacks.canaries.record_files import ENDINGS
from ezmia_callbacks.cli.audit import audit
from ezmia_callbacks.cli.doctor import doctor
from ezmia_callbacks.cli.plan import plan
from ezmia_callbacks.cli.runs import compare, report
from ezmia_callbacks.cli.split import split
from ezmia_callbacks.cli.terminal import (
    ExitCode,
    JsonOption,
    fail,
    messages_on_standard_error,
    quiet_libraries,
    say_all,
    say_json,
    says_all,
)
from ezmia_callbacks.safe_text import describe_error, for_terminal, get_logger

__all__: list[str] = []

# By its name: the module may be run as `__main__`.
logger = get_logger("ezmia_callbacks.cli.command")

# What an interrupted command exits with.
_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from ezmia_callbacks import __version__

        typer.echo(f"ezmia {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    is_debugged: Annotated[
        bool,
        typer.Option("--debug", help="Show all that errors say, with tracebacks: they may quote records."),
    ] = False,
) -> None:
    """Measure how much a fine-tuned language model gives away about the records it was trained on.

    Before a run: doctor, plan, split. After it: audit, report, compare. During it: the callbacks of the
    Python package. To see it all in action: demo.
    """
    if is_debugged:
        say_all()


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Name or path of a causal language model; by default a small one is trained."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=f"Your records: {ENDINGS}."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the plot and the summary.")] = Path("ezmia-demo"),
    limit: Annotated[float, typer.Option(help="Largest tolerated AUC, above 0.5 and below 1.")] = 0.75,
    epochs: Annotated[int, typer.Option(min=1, help="Most epochs of each run.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    is_json: JsonOption = False,
) -> None:
    """Fine-tune a model twice, with full weights and with LoRA, under one leakage budget."""
    from ezmia_callbacks.demo.run import DemoSettings, run_demo

    settings = DemoSettings(
        model=model, data=data, output_dir=output, limit=limit, n_epochs=epochs, seed=seed
    )
    if not is_json:
        run_demo(settings)
        return
    from rich.console import Console

    from ezmia_callbacks.report.document import to_document

    with quiet_libraries():
        histories = run_demo(settings, console=Console(stderr=True))
    say_json(to_document(histories))


for _command in (doctor, plan, split, audit, report, compare):
    app.command()(_command)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(_run())


def _run() -> int:
    """The exit code, after the error's line was printed."""
    with messages_on_standard_error():
        try:
            code = app(prog_name="ezmia", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            fail("interrupted.", ExitCode.FAILED)
            return _INTERRUPTED
        except Exception as error:
            logger.debug("All that the error says:", exc_info=error)
            return _explain(error)
    return code if isinstance(code, int) else ExitCode.OK


def _explain(error: Exception) -> int:
    """The exit code of an error, after its line was printed."""
    if isinstance(error, NonFiniteLogitsError | AuditMemoryError):
        return fail(str(error), ExitCode.FAILED)
    if isinstance(error, AuditError):
        return fail(str(error), ExitCode.BAD_INPUT)
    if isinstance(error, OSError):
        return fail(_of_system(error), ExitCode.BAD_INPUT)
    # Usage errors of typer, whose class moved from click into typer.
    if hasattr(error, "show"):
        # It quotes arguments, and names of files among them.
        error.message = for_terminal(str(getattr(error, "message", error)))  # type: ignore[attr-defined]
        error.show()
        return ExitCode.BAD_INPUT
    if not says_all():
        # Where it happened, without what it says: that may quote a record, and reports of bugs are public.
        typer.echo(for_terminal("".join(traceback.format_tb(error.__traceback__))), err=True, nl=False)
    typer.echo(for_terminal(describe_error(error)), err=True)
    return fail("this is a bug, please report it (`ezmia --debug ...` says more).", ExitCode.FAILED)


def _of_system(error: OSError) -> str:
    """What the operating system says, by the name of the file and without a number."""
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{str(error.filename)!r}: {error.strerror}."


if __name__ == "__main__":
    main()
