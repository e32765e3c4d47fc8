"""Training data and configurations at URLs: what is read is what the same files in a local folder give."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from kandinsky_jax.common.errors import hide_secrets, shorten
from kandinsky_jax.training.config import TrainingConfigError, load
from kandinsky_jax.training.data import DataError, Listing, Reader, data_fingerprint, listing
from tests.batch.store import FAULTS, object_store
from tests.training.test_config import NEEDED
from tests.training.test_listing import PNG, tar_of

NAMES = ("a", "b", "é ü", "x#1", "50%20", "[y]", "q?", "a+b", "c.d", "Z", "10", "9")


@pytest.fixture(scope="module")
def store():
    with object_store("bucket") as store:
        yield store


@pytest.fixture
def healthy(store):
    return store.heal()


@pytest.fixture
def memory():
    """URL of an empty folder in memory."""
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)


def upload(folder: Path, url: str) -> str:
    """Copy a folder's files to a URL."""
    fs, root = fsspec.core.url_to_fs(url)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes()), files))
    return url


def put(store, name: str, data: bytes) -> str:
    """Store an object in one request; above 1 MB, gcsfs warns of its own ones."""
    path = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
    status, _, _ = store.forward("POST", path, {"Content-Type": "application/octet-stream"}, data)
    assert status == 200
    return f"gs://bucket/{name}"


def content(found: Listing) -> list[tuple]:
    """Everything that a listing's items hold except times; of unreadable pictures the kind of error."""

    def read(function):
        try:
            return None if function is None else function()
        except (OSError, ValueError) as error:
            return type(error), str(error)

    return [(item.name, item.text, item.size, read(item.read), read(item.hint)) for item in found]


def assert_equal(local: str | Path, url: str, **options) -> None:
    here, there = listing(local, **options), listing(url, **options)
    assert content(here) == content(there)
    assert here.skipped.faults == there.skipped.faults
    assert here.skipped.count == there.skipped.count
    assert data_fingerprint(here) == data_fingerprint(there)


def faults_of(path: str | Path) -> list[str]:
    """Return the faults of data without a usable picture; none for other data."""
    try:
        listing(path)
    except DataError as error:
        return error.faults
    return []


# Random trees -----------------------------------------------------------------------------------------------------


def random_tree(seed: int, folder: Path) -> Path:
    """Write files of every kind, some of them damaged, into nested folders."""
    rng = random.Random(seed)
    for path in [folder, *(folder / a for a in rng.sample(NAMES, 2)), folder / "b" / rng.choice(NAMES)]:
        path.mkdir(parents=True, exist_ok=True)
        for name in rng.sample(NAMES, 6):
            _write_pair(rng, path, name)
        if rng.random() < 0.6:
            _write_metadata(rng, path)
        if rng.random() < 0.8:
            _write_tar(rng, path / f"{rng.choice(NAMES)}.tar")
        if rng.random() < 0.8:
            _write_parquet(rng, path / f"{rng.choice(NAMES)}.parquet")
        for name in ("b.tar.gz", "lost.txt", "c.heic", ".hidden.png", ".hidden/x.png", "metadata.csv", "d.zip"):
            if rng.random() < 0.3:
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(b"x")
    return folder


def _picture(rng: random.Random) -> bytes:
    return PNG + rng.randbytes(rng.choice((0, 10, 30_000)))


def _caption(rng: random.Random) -> tuple[str, bytes]:
    text = rng.choice(("a cat", "", "ein Bär \u2028", "x" * 200))
    broken = rng.choice((b"\xff\xfe\xfd", b"{", "fée".encode("latin-1")))
    choices = [(".txt", text.encode()), (".json", json.dumps({"caption": text}).encode()), (".txt", broken)]
    return rng.choice([*choices, (".json", broken), (".txt", text.encode("utf-16"))])


def _write_pair(rng: random.Random, folder: Path, name: str) -> None:
    (folder / f"{name}{rng.choice(('.png', '.JPG', '.webp'))}").write_bytes(
        _picture(rng) if rng.random() < 0.9 else b""
    )
    for _ in range(rng.randrange(3)):
        suffix, data = _caption(rng)
        (folder / f"{name}{suffix}").write_bytes(data)
    if rng.random() < 0.3:
        (folder / f"{name}.hint.png").write_bytes(_picture(rng))


def _write_metadata(rng: random.Random, folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.png")]
    names += ["../a.png", "/etc/passwd", "gs://bucket/a.png", "nothing.png", "b/../../x.png", "./a.png", ".hidden.png"]
    rows = [{"file_name": rng.choice(names), "text": rng.choice(("m", "n", ""))} for _ in range(12)]
    rows[0]["hint_file_name"] = rng.choice(names)
    (folder / "metadata.jsonl").write_text("\n".join([*map(json.dumps, rows), "{", "null"]))


def _write_tar(rng: random.Random, path: Path) -> None:
    files = []
    for i in range(rng.randrange(1, 30)):
        suffix, data = _caption(rng)
        files += [(f"{i:03d}.png", _picture(rng)), (f"{i:03d}{suffix}", data)]
        files += [(f"{i:03d}.hint.png", _picture(rng))] * (rng.random() < 0.2)
    tar_of(path, files)
    data = bytearray(path.read_bytes())
    damage = rng.random()
    if damage < 0.3:
        data = data[: rng.randrange(len(data))]
    elif damage < 0.6:
        with tarfile.open(path) as tar:
            data[rng.choice(tar.getmembers()).offset + 20] ^= 1
    path.write_bytes(data)


def _write_parquet(rng: random.Random, path: Path) -> None:
    rows = [{"image": {"bytes": _picture(rng), "path": None}, "text": rng.choice(("p", None, ""))} for _ in range(20)]
    rows[rng.randrange(20)]["image"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=rng.choice((3, 20)))
    if rng.random() < 0.2:
        path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("seed", range(12))
def test_a_random_tree_in_memory_is_read_as_on_a_disk(tmp_path, memory, seed):
    assert_equal(random_tree(seed, tmp_path / "data"), upload(tmp_path / "data", memory))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_random_tree_in_an_object_store_is_read_as_on_a_disk(healthy, tmp_path, seed):
    local = random_tree(100 + seed, tmp_path / "data")
    url = upload(local, f"gs://bucket/tree-{seed}")
    assert_equal(local, url)
    for path in [*local.rglob("*.tar"), *local.rglob("*.parquet"), *local.rglob("metadata.jsonl")]:
        there = f"{url}/{path.relative_to(local)}"
        if refused := faults_of(path):
            assert faults_of(there) == refused
        else:
            assert_equal(path, there)


def test_a_random_tree_is_read_from_a_faulty_store(healthy, tmp_path):
    local = random_tree(7, tmp_path / "data")
    url = upload(local, "gs://bucket/faulty")
    healthy.random_faults(1, 0.2)
    assert_equal(local, url)
    assert set(healthy.faults) == set(FAULTS)


@pytest.mark.parametrize("fault", ["503", "dropped"])
def test_requests_are_repeated_after_gcsfs_gives_up(healthy, fault):
    """More faults in a row than gcsfs alone takes."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name, data in (("a.png", PNG), ("a.txt", b"a")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    put(healthy, "repeated.tar", tar.getvalue())
    faults = iter([fault] * 14)
    healthy.fault = lambda method, path: next(faults, None)
    [item] = listing("gs://bucket/repeated.tar")
    assert next(faults, None) is None
    faults = iter([fault] * 14)
    assert item.read() == PNG
    assert next(faults, None) is None


def test_threads_read_what_one_thread_reads(healthy, tmp_path):
    """As grain's threads do, which share the file system and the Parquet files."""
    local = random_tree(3, tmp_path / "data")
    found = listing(upload(local, "gs://bucket/threads"))
    order = [i for i in range(len(found)) for _ in range(3)]
    random.Random(0).shuffle(order)
    wanted = content(listing(local))
    with ThreadPoolExecutor(16) as threads:
        read = list(threads.map(lambda i: content(found[i : i + 1])[0], order))
    assert read == [wanted[i] for i in order]


# Names ------------------------------------------------------------------------------------------------------------


def test_objects_that_no_folder_could_hold(memory, healthy):
    """Empty objects that stand for folders, empty names, and names that lead out."""
    fs = fsspec.filesystem("gs")
    for name in ("odd/a.png", "odd/b/../c.png", "odd/b//d.png", "odd/./e.png", "odd2/f.png", "odd/g/h.png"):
        fs.pipe_file(f"bucket/{name}", PNG)
        fs.pipe_file(f"bucket/{name.replace('.png', '.txt')}", b"text")
    fs.pipe_file("bucket/odd/g/", b"")
    rows = [{"file_name": name, "text": "x"} for name in ("../odd2/f.png", "b/../c.png", "b//d.png", "../f.png")]
    fs.pipe_file("bucket/odd/metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = listing("gs://bucket/odd")
    assert [item.name for item in found] == ["a.png", "g/h.png"]
    assert len(found.skipped.faults) == 6
    named = "\n".join(found.skipped.faults)
    assert "metadata.jsonl, line 1: '../odd2/f.png' leads out of the folder" in named
    assert "metadata.jsonl, line 2: b/../c.png: there is no such file" in named
    assert "b//d.png: it has an empty name, or is in a folder of an empty name" in named


def test_results_below_the_data_are_excluded(memory, tmp_path):
    for name in ("a", "out/samples/b", "outer/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(PNG)
        (tmp_path / f"{name}.txt").write_text(name)
    url = upload(tmp_path, memory)
    for exclude in (f"{url}/out", f"{url}/out/"):
        found = listing(f"{url}/", exclude=[exclude])
        assert [item.text for item in found] == ["a", "outer/c"]
        assert found.skipped.count == 0
    for exclude in (url, str(tmp_path), "gs://bucket/out", f"{url}/ou", "unknown://x", url.rpartition("/")[0]):
        assert [item.text for item in listing(url, exclude=[exclude])] == ["a", "out/samples/b", "outer/c"], exclude
    assert [item.text for item in listing(f"{url}/out", exclude=[url])] == ["out/samples/b"]
    assert [item.text for item in listing(tmp_path, exclude=[f"file://{tmp_path}/out", url])] == ["a", "outer/c"]


def test_a_file_url_is_a_local_path(tmp_path):
    assert_equal(random_tree(1, tmp_path / "data"), f"file://{tmp_path / 'data'}")


def test_changed_objects_have_another_time(healthy):
    fs = fsspec.filesystem("gs")
    marks = []
    for data in (PNG, PNG[::-1]):
        fs.pipe_file("bucket/changed/a.png", data)
        fs.pipe_file("bucket/changed/a.txt", b"a")
        found = listing("gs://bucket/changed")
        assert data_fingerprint(found, modified=True) == data_fingerprint(listing("gs://bucket/changed"), modified=True)
        marks.append((data_fingerprint(found), data_fingerprint(found, modified=True)))
    assert marks[0][0] == marks[1][0]
    assert marks[0][1] != marks[1][1]
    assert abs(found[0].modified / 1e9 - time.time()) < 600


# Requests ---------------------------------------------------------------------------------------------------------


def requests_of(store, action) -> list[str]:
    found: list[str] = []
    store.fault = lambda method, path: found.append(f"{method} {path}")
    action()
    store.fault = lambda method, path: None
    return found


def test_a_tar_is_listed_in_few_requests_and_read_in_one_each(healthy, tmp_path):
    files = {f"{i:05d}.{end}": data for i in range(5000) for end, data in (("png", PNG), ("txt", b"text"))}
    data = tar_of(tmp_path / "t.tar", files).read_bytes()
    put(healthy, "t.tar", data)
    found: list = []
    asked = requests_of(healthy, lambda: found.extend(listing("gs://bucket/t.tar")))
    assert len(found) == 5000
    assert len(asked) <= len(data) / 2**22 + 8
    assert len(requests_of(healthy, lambda: [item.read() for item in found[10:15]])) == 5


def test_large_pictures_in_a_tar_are_not_downloaded_to_list_it(healthy, tmp_path):
    large = PNG + bytes(20 * 2**20)
    tar = tar_of(tmp_path / "t.tar", {f"{i}.{end}": d for i in range(3) for end, d in (("png", large), ("txt", b"t"))})
    put(healthy, "large.tar", tar.read_bytes())
    sent = []
    forward = healthy.forward
    healthy.forward = lambda *request: sent.append(forward(*request)) or sent[-1]
    try:
        assert len(listing("gs://bucket/large.tar")) == 3
    finally:
        healthy.forward = forward
    assert sum(len(data) for _, _, data in sent) < 5 * 2**22


def test_a_folder_is_listed_without_a_request_for_each_picture(healthy, tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a"}) for i in range(50)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    upload(tmp_path, "gs://bucket/flat")
    assert len(requests_of(healthy, lambda: listing("gs://bucket/flat"))) <= 4


def test_a_row_group_of_parquet_is_copied_in_few_requests(healthy, tmp_path):
    rows = [{"image": PNG + bytes([i]) * 20_000, "text": "a"} for i in range(100)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, compression="none", row_group_size=50)
    put(healthy, "p.parquet", buffer.getvalue())
    found: list = []
    assert len(requests_of(healthy, lambda: found.extend(listing("gs://bucket/p.parquet")))) <= 8
    assert len(requests_of(healthy, lambda: [item.read() for item in found[:50]])) <= 6
    assert [item.read() for item in found] == [row["image"] for row in rows]


# Faults -----------------------------------------------------------------------------------------------------------


def test_urls_that_cannot_be_listed(healthy, memory):
    for url, says in (
        ("gs://bucket/absent", "it does not exist"),
        ("gs://no-such-bucket/data", "it does not exist"),
        (memory, "it does not exist"),
        ("unknown://user:password@host/data", "cannot be opened: Protocol not known: unknown"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            listing(url)
        assert len(str(caught.value)) < 500
        assert "password" not in str(caught.value)
    healthy.fault = lambda method, path: "503"
    with pytest.raises(DataError, match="it cannot be listed"):
        listing("gs://bucket/absent")


def test_a_picture_that_is_gone_costs_itself(healthy):
    fs = fsspec.filesystem("gs")
    for name in ("a", "b"):
        fs.pipe_file(f"bucket/gone/{name}.png", PNG)
        fs.pipe_file(f"bucket/gone/{name}.txt", b"text")
    gone, left = listing("gs://bucket/gone")
    fs.rm_file("bucket/gone/a.png")
    reader = Reader(64)
    assert reader(gone, None) is None
    assert reader(left, None) is not None
    assert "No such file or directory: 'bucket/gone/a.png'" in reader.unreadable["a.png"]


def test_a_signed_url_names_nothing_by_its_query(healthy, tmp_path):
    """Over HTTP, from the store's own links."""
    tar_of(tmp_path / "t.tar", {"a.png": PNG, "a.txt": b"a"})
    put(healthy, "signed.tar", (tmp_path / "t.tar").read_bytes())
    [item] = listing(f"http://{healthy.host}/download/storage/v1/b/bucket/o/signed.tar?alt=media&signature=secret")
    assert item.name == "signed.tar/a.png"
    assert item.read() == PNG


def test_secrets_in_urls_are_hidden():
    for text, hidden in (
        ("ftp://me:p@ss@host/a b", "ftp://***@host/a b"),
        ("at https://host/a.tar?X-Amz-Signature=1&b=2: no", "at https://host/a.tar?*** no"),
        ("'https://host/a?b' is", "'https://host/a?***' is"),
        ("gs://bucket/a@b?c", "gs://bucket/a@b?***"),
        ("what? a@b", "what? a@b"),
    ):
        assert hide_secrets(text) == shorten(text) == hidden
    with pytest.raises(DataError) as caught:
        listing("http://user:secret@127.0.0.1:1/data?token=secret")
    assert "secret" not in str(caught.value)


# Configurations ---------------------------------------------------------------------------------------------------


def test_a_configuration_at_a_url(healthy, memory):
    fs = fsspec.filesystem("gs")
    fs.pipe_file("bucket/c.toml", NEEDED.replace('"d"', '"gs://bucket/photos"').encode())
    assert load("gs://bucket/c.toml").data == "gs://bucket/photos"
    healthy.random_faults(2, 0.4)
    assert load("gs://bucket/c.toml").output == "o"
    healthy.fault = lambda method, path: None
    fs.pipe_file("bucket/large.toml", bytes(300_000))
    fs.pipe_file("bucket/latin.toml", b"\xff")
    for url, says in (
        ("gs://bucket/absent.toml", "there is no such file"),
        ("gs://bucket/large.toml", "is larger than 262,144 bytes"),
        ("gs://bucket/latin.toml", "is not UTF-8 text"),
        ("gs://bucket", "is a folder, needed is a file"),
        ("unknown://a:secret@b/c", "cannot be opened: Protocol not known"),
    ):
        with pytest.raises(TrainingConfigError, match=says) as caught:
            load(url)
        assert "secret" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["model", "prior"])
def test_a_model_at_a_url_is_refused(tmp_path, name):
    lines = [line for line in NEEDED.splitlines() if not line.startswith(name)] + [f'{name} = "gs://b/model"']
    (tmp_path / "c.toml").write_text("\n".join(lines))
    with pytest.raises(TrainingConfigError, match=f"{name} must be a folder or a Hub repository, got the URL gs://b/"):
        load(tmp_path / "c.toml")


@pytest.mark.slow
def test_the_command_reads_its_configuration_from_a_url(healthy, tmp_path):
    """And the data; its results are those of local files."""
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.png").write_bytes(PNG)
        (tmp_path / "data" / f"{i}.txt").write_text(f"picture {i}")
    upload(tmp_path / "data", "gs://bucket/run/data")
    losses = []
    for where, data in (("local", tmp_path / "data"), ("remote", "gs://bucket/run/data")):
        lines = [f'model = "tiny"\ndata = "{data}"\noutput = "{tmp_path / where}"\nresolution = 64\n']
        lines += ["train_batch_size = 2\n[optimizer]\nmax_train_steps = 2\n"]
        config = f"gs://bucket/run/{where}.toml"
        fsspec.filesystem("gs").pipe_file(config, "".join(lines).encode())
        command = [sys.executable, "-m", "kandinsky_jax.cli", "train", "prior", config, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / where / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
