"""What every engine makes of its jobs, and the Ray engine on a real cluster; `test_workers` has what only local workers do."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.ray_engine import TASKS_PER_SLOT
from megatron_vocagno.preprocess.workers import ONE_THREAD, JobFailure, run_local
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents, make, write_jsonl
from tests.preprocess import tasks
from tests.preprocess.ray_cluster import CPUS, Cluster
from tests.preprocess.tasks import ERRORS, JOBS, die, do, fail, runs, square, wait_until
from tests.preprocess.test_build_dataset import ROOT, arguments

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
LOCAL = {"this process": 1, "two workers": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    yield started
    started.end()
    assert not [file for file in Path("/dev/shm").iterdir() if "plasma" in file.name]


@pytest.fixture(scope="module")
def call(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Calls a function in another process: Ray reads its environment once, and changes signal handlers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("RAY_")]:
                patch.delenv(name)
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            driver.submit(square, 1).result()
        yield lambda function, *args, **rest: driver.submit(function, *args, **rest).result(timeout=120)


# ---- every engine


@dataclass(frozen=True)
class Engine:
    name: str
    run: Callable[..., list[Any]]
    """A task over jobs; their results as a list."""

    @property
    def has_workers(self) -> bool:
        return self.name != "this process"


RAY = pytest.param("Ray", marks=[pytest.mark.slow, with_ray])
with_workers = pytest.mark.parametrize("engine", ["two workers", RAY], indirect=True)


@pytest.fixture(scope="module", params=[*LOCAL, RAY])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "Ray":
        call, cluster = map(request.getfixturevalue, ("call", "cluster"))
        return Engine("Ray", partial(call, tasks.gather, cluster.address))
    return Engine(request.param, lambda task, jobs, **rest: list(run_local(task, jobs, LOCAL[request.param], **rest)))


@pytest.fixture(scope="module")
def results(engine: Engine) -> tuple[list[Any], dict[tuple[str, Any], str]]:
    """Of jobs of every kind: the results, and the reasons of the failures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "3")
        before = dict(os.environ)
        found = engine.run(do, JOBS)
        assert dict(os.environ) == before
    failures = {result.job: result.reason for result in found if isinstance(result, JobFailure)}
    return [result for result in found if not isinstance(result, JobFailure)], failures


def test_every_job_has_its_result(engine, results):
    assert sorted(result for result in results[0] if isinstance(result, int)) == [i * i for i in range(20)]
    assert engine.run(square, []) == []


def test_what_a_task_raises_is_the_failure_of_its_job_alone(engine, results):
    _, failures = results
    assert failures.keys() == {("fail", i) for i in ERRORS} | ({("lock", None)} if engine.has_workers else set())
    assert failures["fail", 1] == "line 7 is bad"
    for i in (2, 3, 4, 5):
        assert "in fail" in failures["fail", i] and f"{type(ERRORS[i]).__name__}: {ERRORS[i]}" in failures["fail", i]


@with_workers
def test_a_result_that_cannot_be_sent_is_a_failure(engine, results):
    reason = results[1]["lock", None]
    assert "cannot be sent" in reason and "lock" in reason


def test_workers_have_one_thread(engine, results):
    found = dict(result for result in results[0] if isinstance(result, tuple))
    assert found.keys() == ONE_THREAD.keys()
    assert found == ONE_THREAD if engine.has_workers else found["OMP_NUM_THREADS"] == "3"


def test_what_the_caller_names_ends_everything(engine):
    with pytest.raises(ZeroDivisionError, match="division") as error:
        engine.run(fail, [0, 2, 6, 7], stop=(KeyError, ArithmeticError))
    assert not engine.has_workers or any("in fail" in note for note in error.value.__notes__)
    if engine.name != "Ray":
        assert not multiprocessing.active_children()
        with pytest.raises(CorpusError, match="line 7"):
            engine.run(fail, [1, 0], stop=(CorpusError,))


@with_workers
def test_a_job_is_run_again_until_the_third_death(engine, tmp_path):
    deaths = {"unharmed": [], "once": [-9], "twice": [-9, -9], "killed": [-9] * 9, "also unharmed": []}
    said = {"killed": "by signal 9 (Killed)"}
    if engine.name == "Ray":
        said = {"killed": "unexpectedly"}
    else:
        deaths |= {"ended": [-9, -9, 7], "by a signal without a name": [-9, -9, -40]}
        said |= {"ended": "with exit status 7", "by a signal without a name": "by signal 40"}
    results = engine.run(die, [(tmp_path / name, codes) for name, codes in deaths.items()])
    failures = {result.job[0].name: result.reason for result in results if isinstance(result, JobFailure)}
    assert sorted(name for name in results if isinstance(name, str)) == sorted(deaths.keys() - said)
    assert failures.keys() == said.keys()
    for name, reason in failures.items():
        assert said[name] in reason and "3 workers died" in reason and "\n" not in reason
    assert {name: len(list((tmp_path / name).iterdir())) for name in deaths} == {
        name: min(3, len(codes)) for name, codes in deaths.items()
    }


# ---- Ray alone


@pytest.mark.slow
@with_ray
class TestRay:
    def test_ray_has_as_many_jobs_as_keep_it_busy(self, call, cluster):
        assert call(tasks.jobs_in_flight, cluster.address, 40) == (TASKS_PER_SLOT * CPUS - 1, TASKS_PER_SLOT * CPUS - 1)

    def test_a_task_that_the_nodes_cannot_import_is_told_at_once(self, call, cluster, tmp_path):
        (tmp_path / "here_alone.py").write_text("def task(job): ...")
        with pytest.raises(CorpusError, match=r"cannot run on the cluster: .*No module named 'here_alone'.*same version"):
            call(tasks.run_here_alone, cluster.address, tmp_path)

    def test_another_version_of_ray_is_told(self, call, cluster):
        with pytest.raises(CorpusError, match=r"Version mismatch(.|\n)*Ray: 2(.|\n)*Ray: 1.0"):
            call(tasks.run_as_version_1, cluster.address)

    def test_a_dataset_has_the_same_bytes_as_from_one_process(self, call, cluster, built, corpus, settings, tmp_path):
        """By the command, also when a worker dies at a shard; relative names mean the same to workers in another folder."""
        names = [os.path.relpath(path, ROOT) for path in (corpus, tmp_path / "out", settings.student, settings.teacher)]
        near = replace(settings, student=names[2], teacher=names[3])
        words = arguments(near, names[0], out=names[1], engine="ray", ray_address=cluster.address, shard_mb=100_000 / 2**20)
        code, out, err = call(tasks.build_on_ray, words, ROOT, tmp_path / "died")
        assert (code, err) == (0, "") and "shard 5/5" in out, err
        assert contents(tmp_path / "out") == contents(built.path)
        assert (tmp_path / "died").exists()

    @pytest.mark.long
    def test_a_dataset_is_scored_as_by_one_process(self, call, cluster, real_settings, smollm2_folder, tmp_path):
        from megatron_vocagno.preprocess.score import ScoringOptions, score
        from tests.runs import write_teacher

        teacher = write_teacher(tmp_path / "teacher", smollm2_folder)
        texts = real.multilingual_texts()
        make([write_jsonl(tmp_path / "corpus.jsonl", texts)], tmp_path / "ours", real_settings, shard_bytes=1500)
        shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
        asked = ScoringOptions(teacher, "float32", context=40, tokens_per_batch=300)
        assert call(tasks.score_on_ray, cluster.address, tmp_path / "theirs", asked) > 2
        assert score(tmp_path / "ours", asked).teacher_losses is not None
        assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")

    @pytest.mark.parametrize(("token", "words"), [({}, "has no token"), ({"RAY_AUTH_TOKEN": "f" * 64}, "its token")])
    def test_nobody_gets_in_without_the_token(self, token, words, cluster, tmp_path):
        with cluster.start(DRIVE, tmp_path, **cluster.no_token, **token) as driver:
            _, errors = driver.communicate(timeout=60)
        assert driver.returncode == 1 and "CorpusError: " in errors and words in errors
        assert not any(tmp_path.iterdir())

    def test_ctrl_c_ends_the_tasks_and_leaves_the_cluster(self, call, cluster, tmp_path):
        with cluster.start(DRIVE, *[tmp_path] * 5) as driver:
            wait_until(lambda: len(list(tmp_path.iterdir())) == CPUS)
            at_work = [int(file.name) for file in tmp_path.iterdir()]
            assert all(map(runs, at_work))
            began = time.monotonic()
            driver.send_signal(signal.SIGINT)
            _, errors = driver.communicate(timeout=60)
            assert time.monotonic() - began < 5
        assert errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")
        wait_until(lambda: not any(map(runs, at_work)), seconds=5)
        assert sorted(call(tasks.gather, cluster.address, square, range(3))) == [0, 1, 4]

    def test_tasks_end_with_the_iterator(self, call, cluster, tmp_path):
        at_work = call(tasks.close_early, cluster.address, tmp_path)
        assert len(at_work) == 1
        wait_until(lambda: not any(map(runs, at_work)), seconds=5)

    @pytest.mark.long
    def test_a_cluster_that_goes_away_is_told(self, cluster, tmp_path):
        """The last test of the cluster: it ends it."""
        with cluster.start(DRIVE, *[tmp_path] * 5) as driver:
            wait_until(lambda: len(list(tmp_path.iterdir())) == CPUS)
            cluster.end()
            _, errors = driver.communicate(timeout=100)
        assert driver.returncode == 1 and "CorpusError: Ray has ended on this machine" in errors


DRIVE = """
import sys
from pathlib import Path
from tests.preprocess.tasks import gather, sleep
gather(sys.argv[1], sleep, [Path(arg) for arg in sys.argv[2:]])
"""
