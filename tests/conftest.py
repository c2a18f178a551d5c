import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import models

torch.set_num_threads(1)


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
