"""The page in the browser: one file, which asks the server that it came from."""

from importlib.resources import files

from fastapi.responses import HTMLResponse


def page() -> HTMLResponse:
    """The page at `/`."""
    text = files("kvtrim.serve").joinpath("page.html").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})
