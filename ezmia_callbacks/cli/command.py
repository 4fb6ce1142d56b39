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
    say_json,
)
from ezmia_callbacks.safe_text import for_terminal

__all__: list[str] = []

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
) -> None:
    """Measure how much a fine-tuned language model gives away about the records it was trained on.

    Before a run: doctor, plan, split. After it: audit, report, compare. During it: the callbacks of the
    Python package. To see it all in action: demo.
    """


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Name or path of a causal language model; by default a small one is trained."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your records: .txt, or .jsonl with a field `text`."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the plot and the summary.")] = Path("ezmia-demo"),
    limit: Annotated[float, typer.Option(help="Largest tolerated AUC, above 0.5 and below 1.")] = 0.7,
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
    try:
        with messages_on_standard_error():
            code = app(prog_name="ezmia", standalone_mode=False)
    except (NonFiniteLogitsError, AuditMemoryError) as error:
        return fail(str(error), ExitCode.FAILED)
    except (AuditError, OSError) as error:
        return fail(str(error), ExitCode.BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted.", ExitCode.FAILED)
        return _INTERRUPTED
    except Exception as error:
        # Usage errors of typer, whose class moved from click into typer.
        if hasattr(error, "show"):
            # It quotes arguments, and names of files among them.
            error.message = for_terminal(str(getattr(error, "message", error)))  # type: ignore[attr-defined]
            error.show()
            return ExitCode.BAD_INPUT
        typer.echo(for_terminal(traceback.format_exc()), err=True)
        return fail("this is a bug, please report it.", ExitCode.FAILED)
    return code if isinstance(code, int) else ExitCode.OK


if __name__ == "__main__":
    main()
