import gc
import os

gc.disable()  # until everything is loaded

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as soon as torch imports Triton

import interpreter
import rooms
import shapes

shapes.check(rooms.shaped())  # before any of them is loaded

import pytest

# torch is loaded where tests run, not in the process that hands them out


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    items.sort(key=lambda item: item.get_closest_marker("process") is None)  # none at the end
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What was loaded stays: collecting garbage looks at what tests make, which is little."""
    interpreter.quicken()
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # which measuring speed does after its own freeze


def pytest_runtest_setup():
    shapes.begin_test()


@pytest.fixture(scope="session", autouse=True)
def small_pictures():
    """What is drawn is looked at by nobody: a third of the dots each way."""
    from kvtrim.report.plots import style

    style._DPI = 40


@pytest.fixture
def llama():
    return _tiny("llama")


@pytest.fixture
def any_model(request):
    return _tiny(request.param)


def pytest_generate_tests(metafunc):
    if "any_model" in metafunc.fixturenames:
        import models

        metafunc.parametrize("any_model", models.ARCHITECTURES, indirect=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama and its tokenizer, saved as transformers saves them."""
    import torch

    import models

    folder = tmp_path_factory.mktemp("model")
    models.tiny("llama", dtype=torch.float32).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chromium():
    """A browser for the pages of one file."""
    import browser

    with browser.started() as one:
        yield one


def _tiny(architecture):
    import models

    return models.tiny(architecture)
