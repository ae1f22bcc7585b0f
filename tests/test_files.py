"""What several processes write at once is whole, whoever they are; and what killed ones left is found, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from megatron_vocagno import files
from megatron_vocagno.files import make_folder, remove_leftovers, write_durably

WRITE = """
import os, sys
from pathlib import Path
from megatron_vocagno.files import write_durably
os.getpid = lambda: 1
file, me = Path(sys.argv[1]), sys.argv[2]
for _ in range(150):
    write_durably(file, ("{" + f'"writer": "{me * 20_000}"' + "}").encode())
    assert len(set(__import__("json").loads(file.read_bytes())["writer"])) == 1
print(len(list(file.parent.iterdir())) >= 1, file.stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("namespace", [True, False])
def test_writers_that_have_one_process_id_write_whole_files(tmp_path: Path, namespace: bool) -> None:
    """As in containers: each is process 1 of its own namespace, or believes so."""
    before = ["unshare", "--map-root-user", "--pid", "--fork"]
    if namespace and subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("no process ids of its own: unshare --pid is not allowed here")
    file = tmp_path / "dataset.json"
    command = [*(before if namespace else []), sys.executable, "-c", WRITE, str(file)]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in "abc"]
    said = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said
    assert list(tmp_path.iterdir()) == [file] and len(orjson.loads(file.read_bytes())["writer"]) == 20_000


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "latest"
    write_durably(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(file, b"new")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"old"


def test_leftovers_are_those_of_that_file_alone(tmp_path: Path) -> None:
    mine, others = (
        f".latest.{'0f' * 16}",
        [f".later.{'0f' * 16}", ".latest.123", ".latest.swp", f".latest.{'0f' * 16}.bak", "latest"],
    )
    for name in (mine, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "latest")
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_every_folder_that_is_made_is_brought_to_disk_with_the_one_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"] and (tmp_path / "a" / "b" / "c").is_dir()
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 3
    monkeypatch.chdir(tmp_path)
    make_folder(Path("d/e"))
    assert synced[3:] == [Path(), Path("d")]


def test_no_temporary_name_is_made_of_a_process_id() -> None:
    root = Path(files.__file__).parent.parent
    sources = [file for folder in ("megatron_vocagno", "tools", "examples") for file in (root / folder).rglob("*.py")]
    assert len(sources) > 100
    assert not [file for file in sources if "getpid" in file.read_text(encoding="utf-8")]
