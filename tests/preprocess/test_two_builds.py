"""Two builds at once into one folder."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.build import build, finish
from megatron_vocagno.preprocess.plan import Slice
from tests.corpus.conftest import contents
from tests.preprocess.tasks import wait_until
from tests.preprocess.test_build_dataset import arguments, finished, start

SHARD = 100_000


@contextmanager
def held(*command: str, out: Path, lock: str) -> Iterator[None]:
    """A build of another process, stopped at work; it ends well afterwards."""
    process = start(list(command))
    try:
        wait_until(lambda: (out / ".build" / lock).exists() and (out / "shards").exists())
        process.send_signal(signal.SIGSTOP)
        yield
        process.send_signal(signal.SIGCONT)
        code, _, err = finished(process)
        assert (code, err) == (0, "")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_second_build_into_a_folder_is_refused(built, corpus, settings, tmp_path):
    out = tmp_path / "out"
    call = partial(arguments, settings, corpus, out=out, shard_mb=SHARD / 2**20, workers=1)
    run = partial(build, [corpus], out, settings, shard_bytes=SHARD)
    with held(*call(), out=out, lock="lock"):
        for second in (run, partial(run, part=Slice(1, 2)), partial(finish, out, settings)):
            with pytest.raises(CorpusError, match=f"another build or scoring is using {out}"):
                second()
    assert contents(out) == contents(built.path)
    # the tasks of one array share the folder
    shutil.rmtree(out)
    with held(*call(shards="1/2"), out=out, lock="lock-1-of-2"):
        for second in (run, partial(run, part=Slice(1, 2)), partial(finish, out, settings)):
            with pytest.raises(CorpusError, match="another build or scoring is using"):
                second()
        run(part=Slice(2, 2))
    finish(out, settings)
    assert contents(out) == contents(built.path)


def test_ctrl_c_while_a_folder_is_being_locked_leaves_nothing(settings, tmp_path, corpus, monkeypatch):
    flock = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(KeyboardInterrupt):
        build([corpus], tmp_path / "out", settings, shard_bytes=SHARD)
    assert flock.call_count == 1 and not (tmp_path / "out").exists()
