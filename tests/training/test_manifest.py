"""training/manifest.py: a damaged checkpoint is found, named and skipped, and no checkpoint can run code."""

import collections
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.state_dict import get_state_dict

from tests.damage import DAMAGES, flip
from tests.training.test_checkpoints import save, train_step, trained, weights
from training import manifest
from training.checkpoints import load_newest_checkpoint
from training.manifest import MANIFEST, METADATA, open_checkpoint, read_metadata, write_manifest

DATA = "__0_0.distcp"
FILES = (METADATA, DATA, MANIFEST)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with the checkpoints of steps 1 and 2, and the weights of step 1."""
    out = tmp_path_factory.mktemp("run")
    model, optimizer = trained(0)
    for step in (1, 2):
        train_step(model, optimizer, step)
        save(out, step, model, optimizer, limit=2)
        if step == 1:
            first = weights(model)
    return out, first


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to damage, and its newest checkpoint."""
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "checkpoints/step-000002"


def swap(path):
    """Replaces a file by the one of the same name in the checkpoint before."""
    shutil.copyfile(path.parent.with_name("step-000001") / path.name, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [*DAMAGES.values(), swap], ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(damage, name, run, copy, capsys):
    """Catches a damaged file that is loaded because only its size or form is checked, damage that ends the run although
    the checkpoint before is sound, and a message that does not name the file."""
    out, newest = copy
    damage(newest / name)
    model, optimizer = trained(0, seed=1)
    assert load_newest_checkpoint(out, model, optimizer) == 1
    printed = capsys.readouterr().out
    assert f"{newest}: broken, trying the one before (" in printed and "resuming after step 1" in printed
    reason = printed.partition("(")[2].partition("\n")[0]
    assert (MANIFEST if damage.__name__ == "delete" and name == MANIFEST else name) in reason, reason
    assert torch.equal(weights(model), run[1])


def test_a_flip_anywhere(copy):
    """Catches a part of a file that no hash covers."""
    _, newest = copy
    for name in FILES:
        whole = (newest / name).read_bytes()
        for i in range(60):
            flip(newest / name, i / 59)
            with pytest.raises(ValueError):
                open_checkpoint(newest, 2)
            (newest / name).write_bytes(whole)
    open_checkpoint(newest, 2)


def test_what_a_folder_may_hold(copy):
    """Catches a file from elsewhere, a whole checkpoint under another step's name, and NFS's leftovers of open files
    taken for damage."""
    _, newest = copy
    (newest / ".nfs0000000001").touch()
    open_checkpoint(newest, 2)
    with pytest.raises(ValueError, match=r"manifest\.json is that of step 2"):
        open_checkpoint(newest, 3)
    (newest / "__1_0.distcp").touch()
    with pytest.raises(ValueError, match=r"__1_0\.distcp does not belong to this checkpoint"):
        open_checkpoint(newest, 2)


def saved_by_torch(out, step, state):
    folder = out / f"checkpoints/step-{step:06d}"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    write_manifest(folder, step)
    return folder


def test_torchs_own_checkpoint(tmp_path):
    """Catches names or a layout other than torch's, and moments that are lost: its checkpoint, with everything that it
    stores, is resumed."""
    model, optimizer = trained(3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    saved_by_torch(tmp_path, 3, {"model": model_state, "optimizer": optimizer_state})
    fresh, fresh_optimizer = trained(0, seed=1)
    assert load_newest_checkpoint(tmp_path, fresh, fresh_optimizer) == 3
    for step in (4, 5):
        train_step(model, optimizer, step)
        train_step(fresh, fresh_optimizer, step)
    assert torch.equal(weights(fresh), weights(model))


def test_another_optimizer(copy, capsys):
    """Catches moments dropped silently because the optimizer has no place for them."""
    model, _ = trained(0)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        load_newest_checkpoint(copy[0], model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "it holds optimizer.state.embed.weight.exp_avg, and this run's optimizer has" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- foreign code


class Call:
    """Calls a function when it is unpickled without restriction."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payloads(target):
    touch = f"touch {target}"
    yield "posix.system", pickle.dumps(Call(os.system, touch))
    yield "builtins.eval", pickle.dumps(Call(eval, f"open({str(target)!r}, 'w')"))
    yield "builtins.getattr", pickle.dumps([Call(getattr, touch, "upper"), Call(os.system, touch)])
    yield "builtins.getattr", pickle.dumps(Call(getattr, _MEM_FORMAT_ENCODING, "__subclasses__"))
    # a module imported by the metadata's own module, by its dotted name
    dotted = f"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c{chr(len(touch))}{touch}"
    yield "torch.distributed.checkpoint.metadata.os.system", dotted.encode("latin1") + b"\x85R."
    yield "OrderedDict, not", pickle.dumps(collections.OrderedDict())
    yield "is damaged", b"\x80\x04" + b"nonsense"


def test_metadata_of_other_pythons(copy, monkeypatch):
    """Catches checkpoints taken for broken of Python 3.11.0 to 3.11.4, which pickle a member of an Enum by its name,
    and of 3.13, whose paths have another module."""
    _, newest = copy
    metadata = read_metadata(newest)
    monkeypatch.setattr(
        _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name))
    )
    of_3_11 = pickle.dumps(metadata)
    of_3_13 = pickle.dumps(metadata, 2, fix_imports=False).replace(b"cpathlib\nPosix", b"cpathlib._local\nPosix")
    assert b"getattr" in of_3_11 and b"_local" in of_3_13
    for content in (of_3_11, of_3_13):
        (newest / METADATA).write_bytes(content)
        assert read_metadata(newest) == metadata


def test_metadata_runs_no_code(copy, tmp_path, capsys):
    """Catches torch's own reader of .metadata, which is pickle.load: the sender of a run folder could run a command at
    --resume. The manifest is no protection, since the sender writes it too."""
    out, newest = copy
    target = tmp_path / "was_run"
    shutil.rmtree(out / "checkpoints/step-000001")
    for named, payload in payloads(target):
        (newest / METADATA).write_bytes(payload)
        write_manifest(newest, 2)
        with pytest.raises(ValueError, match="no checkpoint can be read"):
            load_newest_checkpoint(out, *trained(0))
        printed = capsys.readouterr().out
        assert f"({METADATA} " in printed and named in printed, printed
        assert not target.exists(), named
    pickle.loads(next(payload for _, payload in payloads(target)))
    assert target.exists()  # the payload does run code


def test_tensor_files_run_no_code(tmp_path, capsys):
    """Catches an entry that is not a tensor, which torch's planner unpickles without restriction, and a tensor file
    with a foreign pickle in it."""
    target = tmp_path / "was_run"
    model, optimizer = trained(1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    bad = {**model_state, "norm.weight": Call(os.system, f"touch {target}")}
    saved_by_torch(tmp_path / "bytes", 1, {"model": bad, "optimizer": optimizer_state})
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        load_newest_checkpoint(tmp_path / "bytes", *trained(0))
    assert "model.norm.weight is a pickle where a tensor should be" in capsys.readouterr().out

    folder = saved_by_torch(tmp_path / "data", 1, {"model": model_state, "optimizer": optimizer_state})
    stored = read_metadata(folder).storage_data
    info = next(info for index, info in stored.items() if index.fqn == "model.norm.weight")
    content = bytearray((folder / DATA).read_bytes())
    replaced = replace_pickle(
        bytes(content[info.offset : info.offset + info.length]), Call(os.system, f"touch {target}")
    )
    content[info.offset : info.offset + info.length] = replaced
    (folder / DATA).write_bytes(content)
    write_manifest(folder, 1)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        load_newest_checkpoint(tmp_path / "data", *trained(0))
    assert "broken, trying the one before" in capsys.readouterr().out
    assert not target.exists()


def replace_pickle(archive: bytes, value: object) -> bytes:
    """Returns torch's zip archive of one tensor with another pickle in it, padded to the same length."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as out:
        for name in source.namelist():
            if name.endswith(("data.pkl", "version", "byteorder")):
                out.writestr(name, pickle.dumps(value, protocol=2) if name.endswith("data.pkl") else source.read(name))
    with zipfile.ZipFile(made, "a") as out:
        out.comment = b" " * (len(archive) - len(made.getvalue()))
    assert len(made.getvalue()) == len(archive)
    return made.getvalue()


def test_the_manifest_can_be_checked_by_hand(copy):
    """Catches a digest that is not sha256sum's, and a file that the manifest does not list."""
    _, newest = copy
    listed = json.loads((newest / MANIFEST).read_text())
    assert listed["step"] == 2 and listed["files"].keys() == {METADATA, DATA}
    sums = "".join(
        f"{sha256}  {newest / name}\n" for name, each in listed["files"].items() for sha256 in each["sha256"]
    )
    (newest / "sums").write_text(sums)
    assert os.system(f"sha256sum --check --quiet {newest / 'sums'}") == 0


def test_pieces_of_a_large_file(tmp_path, monkeypatch):
    """Catches a piece of a file that is not hashed, or hashed at the wrong offset."""
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1000)
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer, limit=1)
    folder = tmp_path / "checkpoints/step-000001"
    entry, whole = json.loads((folder / MANIFEST).read_text())["files"][DATA], (folder / DATA).read_bytes()
    assert entry["sha256"] == [hashlib.sha256(whole[i : i + 1000]).hexdigest() for i in range(0, len(whole), 1000)]
    for i in range(len(entry["sha256"])):
        flip(folder / DATA, (1000 * i + 7) / len(whole))
        with pytest.raises(ValueError, match=f"{DATA} is damaged"):
            open_checkpoint(folder, 1)
        (folder / DATA).write_bytes(whole)
    open_checkpoint(folder, 1)
