import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from a second thread, and lose much on a busy machine
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = "-1"  # scripts/gpu_report.sh is for GPUs
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more would start processes that import torch
os.fsync = os.fstat  # syncing to disk is slow and protects nothing here; os.fstat refuses bad file descriptors too

import pytest

from tests.forked import start_server


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Distributes and orders tests that run in several processes (scripts/test.sh). A file stays in one process, since
    its fixtures are expensive, and so do all files that use ranks, which are started once. These take longest, so they
    come first; training follows; the last files are short, so that no process waits long for another."""
    for item in items:
        group = "ranks" if hasattr(item.module, "launch") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (hasattr(item.module, "launch"), str(item.path)), reverse=True)


def pytest_collection_finish():
    """Freezes the million objects of imported modules, which the garbage collector would scan again and again, and
    starts the server of tests/forked.py."""
    gc.collect()
    gc.freeze()
    start_server()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random GQA LLaMA folder with a sentencepiece tokenizer; read-only."""
    from tests import tiny

    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.write_model(path)
    return path


@pytest.fixture(scope="session")
def hf_model(folder):
    """transformers' model of `folder`."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
