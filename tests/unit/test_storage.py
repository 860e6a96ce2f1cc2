"""Storage: whole objects at a URI, local and elsewhere, and foreign errors as ours."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import storage
from pipeline.errors import InputError, StorageError


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    """URI of an empty folder on the local disk, in fsspec's memory, and on a real S3 server."""
    if request.param == "local":
        yield f"{tmp_path}/folder"
        return
    uri = request.getfixturevalue("s3").prefix("unit") if request.param == "s3" else f"memory://{tmp_path}"
    yield uri
    storage.remove_folder(uri)


def test_bytes_read_back_as_written(folder):
    """Folders on the way are made; a second write replaces the first."""
    for data in (b"first, longer", b"second", b""):
        storage.write_bytes(f"{folder}/a/b/object", data)
        assert data == storage.read_bytes(f"{folder}/a/b/object")


def test_a_range_of_bytes_is_what_lies_between_start_and_stop(folder):
    """Half-open, as slices are."""
    storage.write_bytes(f"{folder}/object", b"0123456789")
    assert (b"234", b"789") == (
        storage.read_bytes(f"{folder}/object", 2, 5),
        storage.read_bytes(f"{folder}/object", 7, None),
    )


def test_an_object_is_open_for_seeking(folder):
    """`reading` gives what Parquet needs."""
    storage.write_bytes(f"{folder}/object", b"0123456789")
    with storage.reading(f"{folder}/object") as file:
        file.seek(-3, os.SEEK_END)
        assert b"789" == file.read()


def test_names_are_sorted_bare_and_without_hidden_ones(folder):
    """Files and folders lying directly there; nothing of what lies deeper, no dot files."""
    for name in ("b", "a.json", "sub/deeper", ".hidden"):
        storage.write_bytes(f"{folder}/{name}", b"")
    assert ["a.json", "b", "sub"] == storage.names(folder)


def test_names_follow_what_is_written_and_removed(folder):
    """A listing is never a stale one."""
    storage.write_bytes(f"{folder}/sub/a", b"")
    assert ["a"] == storage.names(f"{folder}/sub")
    storage.write_bytes(f"{folder}/sub/b", b"")
    assert ["a", "b"] == storage.names(f"{folder}/sub")


def test_a_folder_that_is_not_there_has_no_names_and_no_objects(folder):
    """Listing asks nothing of a fresh run."""
    assert ([], {}) == (storage.names(f"{folder}/none"), storage.objects(f"{folder}/none"))


def test_objects_of_a_folder_that_cannot_be_listed_are_an_error(tmp_path, monkeypatch):
    """They are not taken for missing: whoever asks deletes commits of what is. A folder that is gone by then is no error."""
    storage.write_bytes(f"{tmp_path}/one/a", b"1")
    storage.write_bytes(f"{tmp_path}/two/b", b"2")
    scandir, raised = os.scandir, PermissionError(errno.EACCES, "denied")

    def failing(path):
        if str(path).endswith("two"):
            raise raised
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(StorageError, match="access denied"):
        storage.objects(str(tmp_path))
    raised = FileNotFoundError(errno.ENOENT, "gone")
    assert ["one/a"] == list(storage.objects(str(tmp_path)))


def test_objects_are_all_that_lies_below_with_size_and_time(folder):
    """However deep, hidden ones too; paths are those below the folder."""
    for name in ("a", "deep/er/b", "deep/.hidden"):
        storage.write_bytes(f"{folder}/{name}", name.encode())
    found = storage.objects(folder)
    assert {"a": 1, "deep/er/b": 9, "deep/.hidden": 12} == {name: one.size_bytes for name, one in found.items()}
    assert all(abs(one.modified_s - time.time()) < 60 for one in found.values())


def test_an_object_is_created_once(folder):
    """The second one is refused and changes nothing; a write replaces it all the same."""
    outcomes = [storage.create_bytes(f"{folder}/deep/a", data) for data in (b"first", b"second")]
    assert ([True, False], b"first") == (outcomes, storage.read_bytes(f"{folder}/deep/a"))
    storage.write_bytes(f"{folder}/deep/a", b"third")
    assert b"third" == storage.read_bytes(f"{folder}/deep/a")
    storage.remove(f"{folder}/deep/a")
    assert storage.create_bytes(f"{folder}/deep/a", b"fourth")


def test_of_many_who_create_at_once_one_wins(folder):
    """Sixteen threads, one object: one is told so, and its bytes stand there."""
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(f"{folder}/a", f"{i}".encode()), range(16)))
    assert [won.index(True)] == [i for i, one in enumerate(won) if one]
    assert f"{won.index(True)}".encode() == storage.read_bytes(f"{folder}/a")


def test_a_store_is_asked_whether_it_creates_and_nothing_stays(folder):
    """Local disks and S3 do; the probe leaves no object."""
    assert storage.creates(folder) or folder.startswith("memory")
    assert {} == storage.objects(folder)


def test_removing_what_is_not_there_is_nothing(folder):
    """An object once removed is gone, and may be removed again."""
    storage.write_bytes(f"{folder}/a", b"")
    for _ in range(2):
        storage.remove(f"{folder}/a")
        assert not storage.exists(f"{folder}/a")


def test_exists_tells_objects_and_folders_from_nothing(folder):
    """True for both, false for a name beside them."""
    storage.write_bytes(f"{folder}/sub/a", b"")
    assert [True, True, False] == [storage.exists(f"{folder}/{name}") for name in ("sub/a", "sub", "sub/b")]


def test_stat_gives_size_and_a_version(folder):
    """Size in bytes; the version is text."""
    storage.write_bytes(f"{folder}/a", b"12345")
    size_bytes, version = storage.stat(f"{folder}/a")
    assert (5, str) == (size_bytes, type(version))


def test_the_version_of_a_local_file_follows_its_modification_time(tmp_path):
    """A file rewritten with as many bytes is another version."""
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    os.utime(path, ns=(10**18, 10**18))
    before = storage.stat(str(path))
    os.utime(path, ns=(10**18, 10**18 + 10**9))
    assert before != storage.stat(str(path))
    os.utime(path, ns=(10**18, 10**18))
    assert before == storage.stat(str(path))


def test_remove_folder_takes_all_of_it_and_only_it(folder):
    """What lies beside stays; removing it again is nothing."""
    for name in ("run/a", "run/deep/b", "runner"):
        storage.write_bytes(f"{folder}/{name}", b"")
    storage.remove_folder(f"{folder}/run")
    storage.remove_folder(f"{folder}/run")
    assert ["runner"] == list(storage.objects(folder))  # some stores list a folder that has become empty


def test_digests_are_sha256_of_the_contents(folder):
    """Streamed and in memory they agree with hashlib, over more than one chunk."""
    data = bytes(range(256)) * (storage.CHUNK_BYTES // 256) + b"rest"
    storage.write_bytes(f"{folder}/large", data)
    expected = hashlib.sha256(data).hexdigest()
    assert (expected, expected) == (storage.file_digest(f"{folder}/large"), storage.bytes_digest(data))


@pytest.mark.parametrize("read", [storage.read_bytes, storage.stat, storage.file_digest])
def test_a_missing_object_is_an_input_error_that_names_it(folder, read):
    """Whatever the store raises, the reader learns which object is not there."""
    with pytest.raises(InputError, match=r"none\.bin does not exist or is not a file"):
        read(f"{folder}/none.bin")


def test_a_folder_is_no_object(tmp_path):
    """Reading a folder says that it is not a file."""
    with pytest.raises(InputError, match="is not a file"):
        storage.read_bytes(str(tmp_path))


def test_an_unknown_scheme_is_a_storage_error_with_examples():
    """The hint shows what a URI may look like."""
    with pytest.raises(StorageError, match=r"s4://bucket/key: Protocol not known") as caught:
        storage.read_bytes("s4://bucket/key")
    assert "s3://bucket/key" in caught.value.hint


@pytest.mark.parametrize("act", [storage.absolute, storage.exists, lambda uri: storage.write_bytes(uri, b"")])
def test_credentials_in_a_uri_are_refused_and_not_repeated(act):
    """A key in a URI would end in the run's folder and in logs; `container@account` of other stores is no key."""
    with pytest.raises(StorageError, match=r"^s3://\.\.\.@bucket/a: a URI with credentials in it") as caught:
        act("s3://key:se/cret@bucket/a")
    assert ("environment" in caught.value.hint, "cret" in str(caught.value)) == (True, False)
    for uri in ("no-such-scheme://container@account/a", "no-such-scheme://host:80/a@b", "no-such-scheme://host/a:b@c"):
        with pytest.raises(StorageError, match=f"^{uri}: Protocol not known"):
            act(uri)


FULL_DISK = """
import resource, sys
from pipeline import storage
from pipeline.errors import StorageError

resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # no file of this process may grow beyond: as if the disk were full
try:
    storage.write_bytes(sys.argv[1], b"new" * 1000)
except StorageError as error:
    print(error)
"""


def test_a_write_that_fails_keeps_the_old_bytes_and_leaves_nothing_behind(tmp_path):
    """On a full disk readers go on seeing the old object, and no temporary file stays."""
    path = tmp_path / "object"
    storage.write_bytes(str(path), b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60)
    assert "object: [Errno 27] File too large" in done.stdout, done.stderr
    assert (b"old", ["object"]) == (path.read_bytes(), os.listdir(tmp_path))


def test_a_write_that_a_bug_stops_leaves_nothing_behind(tmp_path):
    """Even an exception that is none of the file system's clears the temporary file away."""
    path = tmp_path / "object"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(TypeError, match="bytes-like"):
        storage.write_bytes(str(path), "text")
    assert (b"old", ["object"]) == (path.read_bytes(), os.listdir(tmp_path))


def test_a_finished_write_leaves_one_file(tmp_path):
    """No temporary file lies beside the object."""
    storage.write_bytes(f"{tmp_path}/object", b"data")
    assert ["object"] == os.listdir(tmp_path)


@pytest.mark.parametrize("below", ["x", "deeper/x"])
def test_writing_below_a_file_is_a_storage_error(tmp_path, below):
    """A store that refuses an object says so in our words, and the file stays."""
    (tmp_path / "file").write_bytes(b"data")
    with pytest.raises(StorageError, match=f"file/{below}"):
        storage.write_bytes(f"{tmp_path}/file/{below}", b"")
    assert b"data" == (tmp_path / "file").read_bytes()


def test_writing_over_a_folder_is_a_storage_error(tmp_path):
    """A folder is not replaced by an object, and no temporary file stays."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        storage.write_bytes(f"{tmp_path}/folder", b"")
    assert ["folder"] == os.listdir(tmp_path)


def test_absolute_means_the_same_from_any_folder(tmp_path, monkeypatch):
    """Relative paths, ~ and trailing slashes become one absolute path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = f"{tmp_path}/runs/a"
    assert [expected] * 5 == [
        storage.absolute(uri) for uri in ("runs/a", "runs/a/", "./runs/a", "~/runs/a", f"file://{tmp_path}/runs/a")
    ]


def test_absolute_leaves_other_schemes_alone():
    """A URI of another store stays as it is, but for a trailing slash."""
    assert ("memory://bucket/a", "memory://bucket/a") == (
        storage.absolute("memory://bucket/a"),
        storage.absolute("memory://bucket/a/"),
    )


@pytest.mark.parametrize("name", ["a b", "100%", "a#b", "a+b&c", "größe 名", "query_id=a%2Fb"])
def test_names_with_odd_characters_are_taken_as_they_are(folder, name):
    """Spaces, percent signs, hashes and letters beyond ASCII are part of the name, on every store."""
    storage.write_bytes(f"{folder}/{name}/object", name.encode())
    assert name.encode() == storage.read_bytes(f"{folder}/{name}/object")
    assert ([name], ["object"]) == (storage.names(folder), storage.names(f"{folder}/{name}"))
    assert [f"{name}/object"] == list(storage.objects(folder))


def test_local_names_with_odd_characters_are_those_on_the_disk(tmp_path):
    """Nothing is quoted on the way."""
    storage.write_bytes(f"{tmp_path}/100% größe#/object", b"data")
    assert b"data" == (tmp_path / "100% größe#" / "object").read_bytes()
