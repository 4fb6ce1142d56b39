"""The command `ezmia`. Bad input gets one clear line on standard error and exit code 2."""

import sys
from pathlib import Path
from typing import Annotated

from ezmia_callbacks.errors import AuditError

try:
    import typer
except ImportError:
    sys.exit('The command needs typer: pip install "ezmia-callbacks[huggingface,report]"')

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure membership leakage of fine-tuned language models.",
)


@app.callback()
def _commands() -> None:
    """Measure membership leakage of fine-tuned language models."""


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
    output: Annotated[Path, typer.Option(help="Folder for picture and summary.")] = Path("ezmia-demo"),
    limit: Annotated[float, typer.Option(help="Largest tolerated AUC, in (0.5, 1).")] = 0.7,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run, at most.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
) -> None:
    """Fine-tune a model twice, with full weights and with LoRA, under one leakage budget."""
    from ezmia_callbacks.demo.run import DemoSettings, run_demo

    run_demo(DemoSettings(model=model, data=data, output_dir=output, limit=limit, n_epochs=epochs, seed=seed))


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except AuditError as error:
        typer.echo(f"ezmia: {error}", err=True)
        sys.exit(2)
