"""What users may rely on."""

import json
import re
import subprocess
import sys

import jaxtyping
import pytest
import torch

import kvtrim


def test_the_public_names_are_these():
    assert sorted(kvtrim.__all__) == [
        "Cache",
        "Document",
        "KvtrimError",
        "LayerView",
        "METHODS",
        "Method",
        "Policy",
        "Result",
        "Scores",
        "__version__",
        "attach",
        "compress",
        "detach",
        "generate",
        "load",
        "load_cache",
        "select",
        "view",
    ]
    assert {*kvtrim.__all__} <= {*dir(kvtrim)}
    for name in {*kvtrim.__all__} - {"METHODS", "Scores", "__version__"}:
        found = getattr(kvtrim, name)
        assert callable(found) and found.__name__ == name  # and no module of that name
    assert isinstance(kvtrim.METHODS["snapkv"], kvtrim.Method)
    assert issubclass(kvtrim.Scores, torch.Tensor | jaxtyping.AbstractArray)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", kvtrim.__version__)


FRESH = """
import json, sys, traceback
for name in ("jaxtyping", "beartype", "hypothesis", "triton", "gguf", "accelerate"):
    sys.modules[name] = None
from transformers import AttentionInterface, AttentionMaskInterface
before = sorted(AttentionInterface()), sorted(AttentionMaskInterface())
import torch, kvtrim, kvtrim.api, kvtrim.engine.select, kvtrim.hf.attach, kvtrim.hf.cache

def changes_nothing():
    assert (sorted(AttentionInterface()), sorted(AttentionMaskInterface())) == before

def same_objects():
    assert kvtrim.generate is kvtrim.api.generate and callable(kvtrim.generate)
    assert kvtrim.select is kvtrim.engine.select.select and callable(kvtrim.select)
    assert callable(kvtrim.load) and callable(kvtrim.compress)

def works():
    q = torch.randn(4, 50, 8); k = torch.randn(2, 50, 8)
    assert 78 <= sum(map(len, kvtrim.select("adakv", q, k, k, keep=40)[0])) <= 80

faults = {}
for check in (changes_nothing, same_objects, works):
    try:
        check()
        faults[check.__name__] = ""
    except BaseException:
        faults[check.__name__] = traceback.format_exc()
print(json.dumps(faults))
"""


@pytest.fixture(scope="module")
def faults():
    """What went wrong in a process of its own, without the tools of the tests."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.process
def test_importing_changes_nothing_in_transformers(faults):
    assert faults["changes_nothing"] == ""


@pytest.mark.process
def test_names_are_the_same_object_however_they_are_reached(faults):
    assert faults["same_objects"] == ""


@pytest.mark.process
def test_the_package_works_without_the_tools_of_its_tests(faults):
    assert faults["works"] == ""


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kvtrim.nothing


def test_methods_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        kvtrim.METHODS["mine"] = kvtrim.METHODS["full"]
