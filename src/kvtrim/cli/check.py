"""`check`: does kvtrim work on this model?"""

from typing import Annotated

import typer

from kvtrim.cli import options, output

Name = Annotated[str, typer.Argument(help="A folder, a .gguf file or a Hub id.")]


def check(
    model: Name,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
) -> None:
    """Compare a model under kvtrim with the same model without, on random tokens."""
    from kvtrim.hf.models.check import check_model
    from kvtrim.hf.models.load import load

    with output.busy(f"loading {model}"):
        loaded, _ = load(model, device=device, dtype=dtype, allow_untested=True)
    with output.busy("checking"):
        findings = check_model(loaded)
    if json:
        output.print_json(
            {"model": model, "works": all(f.passed for f in findings)}
            | {"checks": [vars(f) for f in findings]}
        )
    else:
        rows = [[f.what, "yes" if f.passed else "NO", _format(f.difference)] for f in findings]
        columns = [("check", "left"), ("passed", "left"), ("largest difference", "right")]
        output.table(f"kvtrim on {model}", output.Cells(columns, rows))
        for why in dict.fromkeys(f.why for f in findings if f.why):
            output.note(why)
    if not all(f.passed for f in findings):
        raise typer.Exit(1)


def _format(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.1e}"
