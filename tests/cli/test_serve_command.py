"""`kvtrim serve`: what cannot be served is said before any model is loaded."""

import socket
import sys

import pytest

pytest.importorskip("fastapi", reason="the server is not installed: pip install 'kvtrim[serve]'")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--api-key", "short"), "at least 8 characters"),
        (("--memory", "half"), "--memory"),
        (("--memory", "50%"), "write a size"),
        (("--replicas", 0), "--replicas"),
        (("--ray-address", "auto"), "say how many"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(run, asked, said):
    code, out, err = run("serve", *asked)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1, err


def test_an_address_that_cannot_be_had_is_said_at_once(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("serve", "--port", taken.getsockname()[1])
    assert code == 2 and "is in use" in err and "--port" in err
    code, _, err = run("serve", "--host", "no.such.host.invalid", "--api-key", "long enough")
    assert code == 2 and "cannot listen at no.such.host.invalid" in err
    (tmp_path / "file").touch()
    code, _, err = run("serve", "--library", tmp_path / "file", "--port", 0)
    assert code == 2 and "name a folder" in err


def test_ray_serve_that_is_missing_is_named(run, monkeypatch):
    import kvtrim.serve

    monkeypatch.delattr(kvtrim.serve, "ray_app", raising=False)
    monkeypatch.delitem(sys.modules, "kvtrim.serve.ray_app", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("serve", "--replicas", 2)
    assert code == 2 and "replicas need ray" in err and "pip install 'kvtrim[replicas]'" in err
