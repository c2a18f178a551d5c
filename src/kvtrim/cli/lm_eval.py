"""`lm-eval`: lm-evaluation-harness's own command line, with kvtrim as a model."""

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; all arguments are its own, and --model kvtrim is known to it.

    For example: kvtrim lm-eval --model kvtrim --tasks hellaswag --limit 100
    --model_args pretrained=smollm2,method=snapkv,keep=512
    """
    from kvtrim import lm_eval as harness

    harness.main(context.args)
