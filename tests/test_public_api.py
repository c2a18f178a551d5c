"""What users may rely on."""

import subprocess
import sys

import pytest

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
    ]
    for name in kvtrim.__all__:
        assert getattr(kvtrim, name) is not None
        assert name in dir(kvtrim)


def test_names_are_the_same_object_however_they_are_reached():
    code = (
        "import kvtrim, kvtrim.api, kvtrim.engine.select\n"
        "assert kvtrim.generate is kvtrim.api.generate and callable(kvtrim.generate)\n"
        "assert kvtrim.select is kvtrim.engine.select.select and callable(kvtrim.select)\n"
        "assert callable(kvtrim.load) and callable(kvtrim.compress)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kvtrim.nothing


def test_methods_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        kvtrim.METHODS["mine"] = kvtrim.METHODS["full"]


def test_the_package_works_without_the_tools_of_its_tests():
    code = (
        "import sys\n"
        "for name in ('jaxtyping', 'beartype', 'hypothesis', 'triton', 'gguf', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import torch, kvtrim, kvtrim.api\n"
        "q = torch.randn(4, 50, 8); k = torch.randn(2, 50, 8)\n"
        "assert len(kvtrim.select('adakv', q, k, k, keep=40)[0]) == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
