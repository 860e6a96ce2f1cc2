"""Copies of remote model folders: private, compared with their digests on every use, and never another user's."""

import json
import multiprocessing
import os
import stat
from pathlib import Path

import fsspec
import pytest

from pipeline import private_copies, storage
from pipeline.errors import InputError, StorageError
from pipeline.model_folder import TOKENIZER_FILES, local_copy, model_digest
from pipeline.private_copies import private_folder

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": b"weights " * 4096,
}
SOMEBODY = 12345
"""Another user's id."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def remote():
    """`memory://` URI of a model's folder."""
    fs = fsspec.filesystem("memory")
    for name, data in FILES.items():
        fs.pipe_file(f"/model/{name}", data)
    yield "memory://model"
    fs.rm("/model", recursive=True)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary folder as machines have it: everybody can write there. No other place is named."""
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(private_copies.tempfile, "gettempdir", lambda: str(shared))
    monkeypatch.delenv("MIRRORSCOPE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return shared


def own_folder(temporary):
    return temporary / f"mirrorscope-{os.getuid()}"


def contents(copy):
    return {path.name: path.read_bytes() for path in Path(copy).iterdir()}


def give_away(folder):
    """Make another user the owner of a folder and all that is in it."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)


def plant(folder, copy, temporary):
    """Put another model where a copy of this one would be looked for."""
    where = folder / Path(copy).relative_to(own_folder(temporary))
    where.mkdir(parents=True)
    for name, data in FILES.items():
        (where / name).write_bytes(data.replace(b"weights", b"poisons").replace(b"llama", b"other"))
    digests = {name: storage.file_digest(str(where / name)) for name in FILES}
    (where.parent / "digests.json").write_text(json.dumps(digests))


def test_a_copy_is_whole_and_nobody_elses(remote, temporary):
    """All files, in folders of mode 0700; the second use takes the same copy."""
    copy = local_copy(remote)
    assert FILES == contents(copy)
    folders = [Path(copy), *Path(copy).parents[:2]]
    assert own_folder(temporary) == folders[-1]
    assert {0o700} == {stat.S_IMODE(folder.stat().st_mode) for folder in folders}
    written = (Path(copy) / "config.json").stat().st_mtime_ns
    assert copy == local_copy(remote)
    assert written == (Path(copy) / "config.json").stat().st_mtime_ns


@as_root
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_a_folder_that_another_user_made_first_is_not_used(remote, temporary, mode, capsys):
    """With a model in it at the very place: the right one is copied elsewhere, and that is said."""
    copy = local_copy(remote)
    own_folder(temporary).rename(temporary / "kept")
    plant(own_folder(temporary), copy, temporary)
    own_folder(temporary).chmod(mode)
    give_away(own_folder(temporary))
    found = local_copy(remote)
    assert FILES == contents(found)
    assert not found.startswith(str(temporary))
    assert "belongs to another user: copies go to" in capsys.readouterr().err


def test_a_link_in_place_of_the_folder_is_not_followed(remote, temporary, tmp_path):
    """Not even to a folder of one's own."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    own_folder(temporary).symlink_to(tmp_path / "elsewhere")
    assert FILES == contents(local_copy(remote))
    assert [] == os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(remote, temporary, mode):
    """What is in it may be theirs."""
    copy = local_copy(remote)
    own_folder(temporary).rename(temporary / "kept")
    plant(own_folder(temporary), copy, temporary)
    own_folder(temporary).chmod(mode)
    found = local_copy(remote)
    assert FILES == contents(found)
    assert not found.startswith(str(own_folder(temporary)))


@as_root
@pytest.mark.parametrize("attack", ["owner", "link", "mode"])
def test_a_copy_that_is_not_ours_is_replaced(remote, temporary, tmp_path, attack):
    """In a private folder, left from a time when others could write there."""
    copy = Path(local_copy(remote))
    if attack == "owner":
        (copy / "config.json").write_bytes(b"{}")
        give_away(copy.parent)
    elif attack == "mode":
        copy.parent.chmod(0o777)
    else:
        copy.parent.rename(tmp_path / "theirs")
        give_away(tmp_path / "theirs")
        copy.parent.symlink_to(tmp_path / "theirs")
    assert FILES == contents(local_copy(remote))
    assert (os.getuid(), 0o700) == (copy.parent.lstat().st_uid, stat.S_IMODE(copy.parent.lstat().st_mode))


@as_root
def test_a_file_of_another_user_in_a_copy_is_replaced(remote, temporary):
    """Its owner could write it after it was looked at."""
    copy = Path(local_copy(remote))
    os.chown(copy / "model.safetensors", SOMEBODY, SOMEBODY)
    assert FILES == contents(local_copy(remote))
    assert os.getuid() == (copy / "model.safetensors").stat().st_uid


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0, -1])
def test_a_flipped_bit_is_found_and_the_copy_replaced(remote, temporary, name, at, capsys):
    """In weights, config and tokenizer; the warning names the file."""
    path = Path(local_copy(remote)) / name
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    assert FILES == contents(local_copy(remote))
    assert f"the copy of {name} is damaged; memory://model is copied again" in capsys.readouterr().err


def test_a_file_more_or_less_is_found_and_the_copy_replaced(remote, temporary):
    """transformers reads more names than these, if they are there."""
    copy = Path(local_copy(remote))
    (copy / "adapter_config.json").write_text("{}")
    assert FILES == contents(local_copy(remote))
    (copy / "tokenizer.json").unlink()
    assert FILES == contents(local_copy(remote))
    (copy.parent / "digests.json").write_text("[]")
    assert FILES == contents(local_copy(remote))


def test_a_digest_from_the_freeze_is_compared(remote, temporary):
    """The right one gives the copy; after another model was put there, the copy is refused by its digest."""
    digest, tokenizer = model_digest(remote), model_digest(remote, TOKENIZER_FILES)
    assert FILES == contents(local_copy(remote, digest=digest))
    assert FILES.keys() - {"model.safetensors"} == contents(local_copy(remote, TOKENIZER_FILES, tokenizer)).keys()
    fsspec.filesystem("memory").pipe_file("/model/model.safetensors", b"others")
    with pytest.raises(InputError, match=f"memory://model is not what the run was frozen with.*expected {digest}"):
        local_copy(remote, digest=digest)


def test_a_local_folder_is_compared_too(tmp_path):
    """It is used where it lies."""
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    digest = model_digest(str(tmp_path))
    assert str(tmp_path) == local_copy(str(tmp_path), digest=digest)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is not what the run was frozen with"):
        local_copy(str(tmp_path), digest=digest)


def test_an_interrupted_copy_is_made_again(remote, temporary, monkeypatch):
    """What it left is no copy, and is removed."""
    download = storage.download

    def cut(uri, path):
        download(uri, path)
        if "safetensors" in uri:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError("the machine is full")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "download", cut)
        with pytest.raises(StorageError, match="the machine is full"):
            local_copy(remote)
    copy = local_copy(remote)
    assert FILES == contents(copy)
    assert {"files", "digests.json"} == set(os.listdir(Path(copy).parent))


def test_a_folder_that_changes_while_it_is_copied_is_refused(remote, temporary, monkeypatch):
    """A copy of half of one model and half of another is none."""
    download = storage.download

    def changing(uri, path):
        download(uri, path)
        fsspec.filesystem("memory").pipe_file("/model/config.json", b"{}")

    monkeypatch.setattr(storage, "download", changing)
    with pytest.raises(InputError, match="memory://model changed while it was copied"):
        local_copy(remote)


def _copy_in_a_process(folder, start, found):
    start.wait(60)
    _, digests = private_copies.verified_copy(f"file://{folder}", list(FILES), lambda _: True)
    found.put(digests)


def test_processes_that_start_at_once_share_one_copy(tmp_path, temporary, monkeypatch):
    """Each gets all of it."""
    (tmp_path / "model").mkdir()
    for name, data in FILES.items():
        (tmp_path / "model" / name).write_bytes(data * 50)
    context = multiprocessing.get_context("fork")
    start, found = context.Event(), context.Queue()
    arguments = (tmp_path / "model", start, found)
    processes = [context.Process(target=_copy_in_a_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    digests = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = {name: storage.file_digest(str(tmp_path / "model" / name)) for name in FILES}
    assert [expected] * len(processes) == digests
    assert 1 == len(list(own_folder(temporary).iterdir()))


def test_a_named_folder_that_is_open_to_others_gets_a_private_one_in_it(tmp_path, monkeypatch):
    """As a disk for everybody's scratch files is."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    monkeypatch.setenv("MIRRORSCOPE_CACHE", str(scratch))
    assert scratch / f"mirrorscope-{os.getuid()}" == private_folder()


@as_root
def test_no_private_folder_is_an_error_with_the_way_out(remote, tmp_path, monkeypatch):
    """Where another user owns the named place, a folder in it can be replaced at any time."""
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", SOMEBODY, SOMEBODY)
    monkeypatch.setenv("MIRRORSCOPE_CACHE", str(tmp_path / "theirs"))
    with pytest.raises(
        StorageError, match=r"theirs belongs to another user(.|\n)*set MIRRORSCOPE_CACHE to a folder of yours"
    ):
        local_copy(remote)
