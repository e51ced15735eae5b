import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from a second thread, and lose much on a busy machine
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = "-1"  # scripts/gpu_report.sh is for GPUs
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more would be processes, which import torch
os.fsync = os.fstat  # nobody pulls the plug here, and a disk takes its time; what is no file is refused all the same

import pytest

from tests.forked import start_server


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items):
    """Where tests run in several processes (scripts/test.sh), a file stays in one of them, since its fixtures are dear;
    and so do all that use ranks, which are started once. They take longest, so they begin; training follows, and the
    files at the end are short, so that no process waits long for the other."""
    for item in items:
        group = "ranks" if hasattr(item.module, "launch") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (hasattr(item.module, "launch"), str(item.path)), reverse=True)


def pytest_collection_finish():
    """What has been imported stays, and the collector need not look through a million objects of it again and again."""
    gc.collect()
    gc.freeze()
    start_server()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random GQA LLaMA folder with a sentencepiece tokenizer; read it only."""
    from tests import tiny

    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.write_model(path)
    return path


@pytest.fixture(scope="session")
def hf_model(folder):
    """transformers' view of `folder`."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
