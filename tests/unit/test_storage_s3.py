"""Storage on a store that has bad moments: what passes is repeated and said, what does not is told in a few seconds."""

import re

import pytest

from pipeline import storage
from pipeline.errors import InputError, StorageError, UnavailableError
from pipeline.folder import parallel
from tests.seaweed import forget

pytestmark = pytest.mark.slow

DATA = b"0123456789" * 20_000
READS = {
    "read": lambda uri: storage.read_bytes(uri),
    "range": lambda uri: storage.read_bytes(uri, 5, 150_000),
    "digest": lambda uri: storage.file_digest(uri),
    "stat": lambda uri: storage.stat(uri),
    "names": lambda uri: storage.names(uri.rsplit("/", 1)[0]),
    "objects": lambda uri: storage.objects(uri.rsplit("/", 1)[0]),
    "exists": lambda uri: storage.exists(uri),
}
WRITES = {
    "write": lambda uri: storage.write_bytes(uri, DATA),
    "create": lambda uri: storage.create_bytes(f"{uri}-new", DATA),
    "remove": lambda uri: storage.remove(uri),
}
EVERYTHING = {**READS, **WRITES}


def some(argument, every, fast):
    """Parametrize over all of `every`; those that are not among `fast` are left to the slow suite."""
    marked = [one if one in fast else pytest.param(one, marks=pytest.mark.slow) for one in every]
    return pytest.mark.parametrize(argument, marked)


@pytest.fixture
def uri(s3_proxy, s3_fresh):
    """An object of DATA; the store has answered once."""
    made = f"{s3_fresh.prefix('proxied')}/object"
    storage.write_bytes(made, DATA)
    s3_proxy.clear()
    return made


def refused(action, uri):
    """The error of an action, which must be a StorageError."""
    with pytest.raises(StorageError) as caught:
        action(uri)
    return caught.value


@some("fault", ["slow_down", "unavailable", "internal", "bare", "drop"], fast=["slow_down", "bare"])
@some("name", EVERYTHING, fast=["read", "write"])
def test_a_bad_answer_is_absorbed_and_said(uri, s3_proxy, capsys, name, fault):
    """Three in a row, whatever the store was asked: the answer is the good one, and one line says what happened."""
    expected = EVERYTHING[name](f"{uri}-other" if name in WRITES else uri)
    s3_proxy.clear()
    s3_proxy.add(fault, times=3)
    assert (expected, 3) == (EVERYTHING[name](uri), s3_proxy.done[fault])
    said = capsys.readouterr().err
    assert 1 == said.count("warning:") == said.count("trying again, at most 8 times")
    assert said.startswith(f"warning: {uri.rsplit('/', 1)[0]}")


@pytest.mark.slow
def test_a_fraction_of_bad_answers_is_absorbed(uri, s3_proxy, capsys):
    """Every third request is throttled: thirty objects are written and read all the same."""
    s3_proxy.add("slow_down", times=None, share=0.3)
    for i in range(30):
        storage.write_bytes(f"{uri}-{i}", f"{i}".encode())
    assert [f"{i}".encode() for i in range(30)] == [storage.read_bytes(f"{uri}-{i}") for i in range(30)]
    assert s3_proxy.done["slow_down"] > 10
    assert 1 == capsys.readouterr().err.count("warning:")


@some("fault", ["slow_down", "internal", "drop"], fast=["slow_down"])
@some("name", EVERYTHING, fast=["read", "write"])
def test_a_store_that_stays_bad_is_an_error_that_counts(uri, s3_proxy, name, fault):
    """Tries end: the error names the object, what the store said and how often it was asked, and it may be tried later."""
    s3_proxy.add(fault, times=None)
    error = refused(EVERYTHING[name], uri)
    assert isinstance(error, UnavailableError)
    assert (True, 7) == (error.retryable, error.exit_code)
    assert re.search(rf"^{uri.rsplit('/', 1)[0]}.*; tried 8 times in \d+ s$", error.message, re.DOTALL)
    assert 8 <= s3_proxy.done[fault] <= 16  # aiohttp opens a broken connection once more by itself


@pytest.mark.slow
def test_requests_are_repeated_in_one_place_only(uri, s3_proxy):
    """Eight tries are eight requests: no client below repeats answers by itself."""
    s3_proxy.add("slow_down", times=None)
    for action in EVERYTHING.values():
        s3_proxy.done.clear()
        refused(action, uri)
        assert 8 == s3_proxy.done["slow_down"]


@some("name", ["read", "stat", "names", "write", "create"], fast=["read"])
def test_a_store_that_hangs_is_asked_again(uri, s3_proxy, monkeypatch, name):
    """Silence beyond the limit counts as no answer."""
    monkeypatch.setattr(storage, "ANSWER_TIMEOUT_S", 1.0)
    forget()
    expected = EVERYTHING[name](f"{uri}-other" if name in WRITES else uri)
    s3_proxy.clear()
    s3_proxy.add("hang", times=1)
    assert (expected, 1) == (EVERYTHING[name](uri), s3_proxy.done["hang"])


@some("name", ["read", "range", "digest", "names", "objects"], fast=["read"])
def test_an_answer_cut_half_way_is_read_again(uri, s3_proxy, name):
    """Bytes that came are thrown away; the whole is what comes back, twice in a row."""
    expected = EVERYTHING[name](uri)
    s3_proxy.clear()
    s3_proxy.add("cut", method="GET", times=2)
    assert (expected, 2) == (EVERYTHING[name](uri), s3_proxy.done["cut"])


def test_a_write_whose_answer_is_lost_is_written_again(uri, s3_proxy):
    """The object is what was written, whether the first or the second of two equal requests made it."""
    s3_proxy.add("lost", method="PUT")
    storage.write_bytes(uri, b"new")
    assert (b"new", 1) == (storage.read_bytes(uri), s3_proxy.done["lost"])


def test_a_creation_whose_answer_is_lost_finds_its_own_object(uri, s3_proxy):
    """It cannot know that the object is its own: it says that something stands there, and that is what it wrote."""
    s3_proxy.add("lost", method="PUT")
    assert not storage.create_bytes(f"{uri}-new", b"mine")
    assert (b"mine", 1) == (storage.read_bytes(f"{uri}-new"), s3_proxy.done["lost"])


@pytest.mark.slow
def test_a_bad_moment_does_not_make_an_object_missing(uri, s3_proxy):
    """Not to know is not a no: `exists` and `names` of a store that fails never say that nothing is there."""
    s3_proxy.add("slow_down", times=None)
    for look in (storage.exists, storage.names, storage.objects):
        with pytest.raises(UnavailableError):
            look(uri)


@some("name", EVERYTHING, fast=["write"])
def test_denied_is_told_at_once(uri, s3_proxy, name):
    """One request, no repetition; the hint names the environment."""
    s3_proxy.add("denied", times=None)
    error = refused(EVERYTHING[name], uri)
    assert (False, 1) == (isinstance(error, UnavailableError), s3_proxy.done["denied"])
    assert "access denied" in error.message
    assert "credentials in the environment" in error.hint


@some("name", EVERYTHING, fast=["read", "write"])
@some("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], fast=["AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_denied_and_not_shown(s3_fresh, monkeypatch, name, variable):
    """The store's own check refuses them; the message holds no key."""
    monkeypatch.setenv(variable, "wrong-but-nobody-should-see-it")
    error = refused(EVERYTHING[name], f"{s3_fresh.prefix()}/object")
    assert "access denied" in error.message
    for secret in ("nobody-should-see-it", s3_fresh.environment["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in f"{error!r} {error.__cause__!r}"


@some("name", [name for name in EVERYTHING if name not in ("read", "range", "digest")], fast=["write"])
def test_no_keys_at_all_are_asked_for(s3_fresh, monkeypatch, tmp_path, name):
    """Nothing in the environment and no profile: the hint says which variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    error = refused(EVERYTHING[name], f"{s3_fresh.prefix()}/object")
    assert "Unable to locate credentials" in error.message
    assert "AWS_ACCESS_KEY_ID" in error.hint


@some("name", [name for name in EVERYTHING if name != "remove"], fast=["read", "names", "write"])
def test_a_missing_bucket_is_named(s3_fresh, name):
    """It is an error of the store, and never mistaken for an empty folder."""
    error = refused(EVERYTHING[name], "s3://no-such-bucket-here/run/object")
    assert "bucket does not exist" in error.message
    assert "AWS_ENDPOINT_URL" in error.hint


@some("name", EVERYTHING, fast=["names"])
@some("endpoint", ["http://127.0.0.1:9", "http://nowhere.invalid"], fast=["http://127.0.0.1:9"])
def test_a_wrong_endpoint_is_told_after_a_few_tries(s3_fresh, monkeypatch, name, endpoint):
    """A store that never answered this process gets fewer tries; the message says where nobody answered."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    error = refused(EVERYTHING[name], f"{s3_fresh.prefix()}/object")
    assert endpoint.removeprefix("http://") in error.message.replace("127.0.0.1 port 9", "127.0.0.1:9")
    assert "; tried 4 times in" in error.message
    assert "AWS_ENDPOINT_URL" in error.hint


@some("name", ["stat", "names", "write"], fast=["write"])
def test_an_endpoint_that_is_no_url_is_told(s3_fresh, monkeypatch, name):
    """A host without http:// in front."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert "http://host:port" in refused(EVERYTHING[name], f"{s3_fresh.prefix()}/object").hint


@some("name", ["read", "range", "digest", "stat"], fast=["read"])
def test_a_missing_object_is_an_input_error(s3_fresh, name):
    """In a bucket that is there; asked once."""
    with pytest.raises(InputError, match=r"object does not exist"):
        EVERYTHING[name](f"{s3_fresh.prefix()}/object")


@pytest.mark.slow
def test_many_objects_are_listed_in_pages(s3_fresh):
    """More than the thousand that one answer holds."""
    folder = s3_fresh.prefix("many")
    expected = [f"{i:04d}" for i in range(1005)]
    parallel(lambda name: storage.write_bytes(f"{folder}/{name}", b""), expected)
    assert (expected, expected) == (storage.names(folder), sorted(storage.objects(folder)))


@pytest.mark.slow
def test_a_large_object_comes_back_whole(s3_fresh):
    """Larger than the part size of a multipart upload: one object, whole, with the right digest."""
    uri = f"{s3_fresh.prefix('large')}/object"
    data = bytes(range(256)) * (60 * 4096)
    storage.write_bytes(uri, data)
    assert (len(data), storage.bytes_digest(data)) == (storage.stat(uri)[0], storage.file_digest(uri))


def test_the_version_is_the_etag(s3_fresh):
    """Other bytes of the same length are another version; a copy of the same bytes is not."""
    uri = f"{s3_fresh.prefix()}/object"
    versions = []
    for data in (b"one", b"two", b"one"):
        storage.write_bytes(uri, data)
        versions.append(storage.stat(uri)[1])
    assert versions[0] == versions[2] != versions[1]


@pytest.mark.slow
def test_a_store_that_restarts_is_waited_for(s3_fresh, monkeypatch):
    """SIGKILL and a new start on the same data: readers and writers in between notice nothing but time."""
    if s3_fresh.server is None:
        pytest.skip("needs a server of our own to kill")
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.25)
    uri = f"{s3_fresh.prefix()}/object"
    storage.write_bytes(uri, DATA)
    s3_fresh.server.restart()
    assert storage.read_bytes(uri) == DATA
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
