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
