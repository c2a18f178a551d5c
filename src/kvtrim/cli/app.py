"""The commands. Heavy imports happen inside them, so that `--help` answers at once."""

from typing import Annotated

import typer

from kvtrim.cli import (
    analyze,
    ask,
    caches,
    calibrate,
    chat,
    check,
    compare,
    eval,
    lm_eval,
    methods,
    recommend,
    report,
    serve,
    speed,
    sweep,
    view,
)
from kvtrim.version import VERSION

app = typer.Typer(
    name="kvtrim",
    help="A small KV cache for Hugging Face language models, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("methods")(methods.methods)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("compress")(ask.compress)
app.command("view")(view.view)
app.command("serve")(serve.serve)
app.command("speed")(speed.speed)
app.command("eval")(eval.evaluate)
app.command("sweep")(sweep.sweep)
app.command("recommend")(recommend.recommend)
app.command("report")(report.report)
app.command("analyze")(analyze.analyze)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(lm_eval.lm_eval)
app.command("check")(check.check)
app.add_typer(caches.group, name="caches")
app.add_typer(calibrate.group, name="calibrate")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvtrim {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[  # taken out by `main`, wherever it stands
        bool, typer.Option("--debug", help="Show where an unforeseen error came from.")
    ] = False,
) -> None:
    """Say what the program is."""
