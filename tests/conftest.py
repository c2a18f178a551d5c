import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as soon as torch imports Triton

import rooms
import shapes

shapes.check(rooms.shaped())  # before any of them is loaded

import pytest
import torch

import models

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def llama():
    return models.tiny("llama")


@pytest.fixture(params=models.ARCHITECTURES)
def any_model(request):
    return models.tiny(request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama and its tokenizer, saved as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    models.tiny("llama", dtype=torch.float32).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder
