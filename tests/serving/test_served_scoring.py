"""Losses from a server are those of the teacher in this process, and nothing else passes for them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx2
import numpy as np
import pytest

from megatron_vocagno.config import Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.indexed import PairReader
from megatron_vocagno.corpus.manifest import SERVED, Canary, TeacherLosses
from megatron_vocagno.corpus.verify import verify
from megatron_vocagno.engine.cached import open_scored
from megatron_vocagno.errors import ChangedError, CorpusError, RunError, ServerError, ServerLostError, UserError
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.preprocess.score_check import Difference
from megatron_vocagno.preprocess.score_served import canary_prompt
from megatron_vocagno.preprocess.shards import BuildConfig
from megatron_vocagno.preprocess.windows import plan_windows
from megatron_vocagno.serving import client
from megatron_vocagno.serving.client import Servers
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import make, write_jsonl
from tests.runs import REPOSITORY
from tests.serving.conftest import Copy, Serve, losses_of, start
from tools.preprocess import score_teacher


def recorded(folder: Path) -> TeacherLosses:
    found = AlignedDataset.open(folder).manifest.teacher_losses
    assert found is not None
    return found


def by(asked: ScoringOptions, *urls: str, **settings: object) -> ScoringOptions:
    return replace(asked, servers=Servers(urls, **{"timeout": 60, "in_flight": 8, "tries": 6} | settings))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.05)


@pytest.mark.parametrize("name", ["vllm+named-by-root", "vllm+tokens", "sglang", "vllm+500=3+429=2"])
def test_the_files_are_those_of_a_teacher_in_this_process(
    name: str, serve: Serve, teacher: Path, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)
    score(folder, by(asked, serve(name)))
    assert losses_of(folder) == losses_of(local)
    verify(folder)
    assert open_scored(Teacher(path=teacher, placement="cached"), [AlignedDataset.open(folder)])
    ours, theirs = recorded(folder), recorded(local)
    assert ours.totals == theirs.totals.model_copy(update={"positions": ours.totals.positions, "padding": 0})
    assert ours.scoring.served is not None and ours.scoring.served.engine == name.partition("+")[0]
    without = ours.scoring.model_copy(update={"served": None, "dtype": "float32"})
    assert without == theirs.scoring and ours.scoring != theirs.scoring


def test_several_servers_share_the_windows(
    serve: Serve, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy
) -> None:
    urls = [serve("vllm") for _ in range(3)]
    folder = copy(unscored)
    score(folder, by(asked, *urls))
    assert losses_of(folder) == losses_of(local)
    counts = [requests(url) for url in urls]
    assert min(counts) > max(counts) / 3


def test_a_server_of_several_may_go_away(
    serve: Serve, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    """After the first shard has begun: requests go to the others, and later shards begin without it."""
    folder, gone = copy(unscored), serve("vllm+away-after=9")
    score(folder, by(asked, gone, serve("vllm"), serve("vllm")))
    assert losses_of(folder) == losses_of(local)
    assert f"continuing without {gone}" in caplog.text


def requests(url: str) -> int:
    return int(httpx2.get(f"{url}/asked", trust_env=False).text)


REFUSED = {
    "vllm+longest=49": r"accepts 49 tokens, and this scoring needs (\d+)\. Start it with --max-model-len \1 ",
    "vllm+other-root": r"serves the weights at \S+, and --teacher is \S+",
    "vllm+truncates": r"read another prompt than the one that was sent: \d+ tokens were sent, 20 were read, 20 were answered",
    "vllm+adds-bos": r"read another prompt than the one that was sent: (\d+) tokens were sent, \d+ were read, \d+ were answered",
    "sglang+adds-bos": r"read another prompt than the one that was sent: \d+ tokens were sent",
    "sglang+truncates": r"read another prompt",
    "vllm+other-ids": r"read another prompt than the one that was sent: token 1 was \d+, and its answer is \{'5'",
    "vllm+without": r"answered without prompt_logprobs\. [\s\S]*a proxy may also have removed them",
    "sglang+without": "answered without input_token_logprobs",
    "vllm+html": "answered with something else than JSON: <html>",
    "vllm+empty": r"/v1/models lists no models\. A teacher needs vLLM",
    "vllm+info+processed": "--logprobs-mode processed_logprobs: start it with --logprobs-mode raw_logprobs",
    "vllm+other-root+named-by-root": r"serves the weights at \S+, and --teacher is \S+: serve that, or name this",
    "vllm+low-logits": r"has a log-probability of -\d+\S*, which is impossible\. Start vLLM with --logprobs-mode raw_logprobs",
    "vllm+nan": "the teacher has losses of a plain text that are not finite",
    "vllm+logits": r"log-probability of \S+(: start vLLM with --logprobs-mode raw_logprobs|, which is impossible\. Start vLLM)",
    "vllm+info+bf16": "computes in bfloat16, and --dtype is float32",
    "vllm+key": "401 [^.]*Unauthorized[^.]*. Set MEGATRON_VOCAGNO_SERVER_KEY",
    "vllm+two": "serves teacher, another: choose the teacher with --served-model",
    "llamacpp": "is llama.cpp's server, which does not give the losses of a prompt",
    "ollama": "is Ollama, which does not give the losses of a prompt",
    "lmdeploy": "is LMDeploy, which does not give the losses of a prompt",
    "trtllm": "is TensorRT-LLM, which does not give the losses of a prompt",
    "tgi": "is Text Generation Inference, which does not give the losses of a prompt",
    "openai": "answered without prompt_logprobs",
    "vllm+500=9": r"no answer in 6 tries of at most 60 seconds\. The last one: 500 [\s\S]*and does it have enough memory",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_teacher_is_refused_before_anything_is_scored(
    name: str, serve: Serve, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)
    with pytest.raises(ServerError, match=REFUSED[name]):
        score(folder, by(asked, serve(name)))
    assert not losses_of(folder)


def test_names(serve: Serve, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy) -> None:
    folder = copy(unscored)
    with pytest.raises(ServerError, match=r"does not serve student\. It serves teacher, another: see --served-model"):
        score(folder, by(asked, serve("vllm+two"), model="student"))
    with pytest.raises(
        ServerError, match=r"adapter is a LoRA adapter of teacher\. Its losses cannot be attributed to the weights of --teacher"
    ):
        score(folder, by(asked, serve("vllm+adapter"), model="adapter"))
    score(folder, by(asked, serve("vllm+two+adapter+key"), model="teacher", key="secret"))


def test_nothing_listens(unscored: AlignedDataset, asked: ScoringOptions, copy: Copy) -> None:
    with pytest.raises(ServerLostError, match=r"no answer in 6 tries[\s\S]*ConnectError"):
        score(copy(unscored), by(asked, "http://127.0.0.1:9"))


def test_servers_that_differ_are_not_mixed(serve: Serve, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy) -> None:
    folder = copy(unscored)
    with pytest.raises(ServerError, match="two servers are not alike, so their losses cannot be mixed"):
        score(folder, by(asked, serve("vllm"), serve("sglang")))
    with pytest.raises(ServerLostError, match="another model answers"):
        score(folder, by(asked, serve("vllm"), serve("vllm+changes-after=0")))


def test_a_model_that_changes_between_shards_is_noticed(
    serve: Serve, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)
    windows = windows_of(unscored, asked)[0]
    # after all of the first shard: its two canaries, and one at the start
    with pytest.raises(ServerLostError, match=r"another model answers\. Its losses of a fixed text differ by \d"):
        score(folder, by(asked, serve(f"vllm+changes-after={windows + 3}")))
    done = losses_of(folder)
    assert len(done) == 2 and done.items() <= losses_of(local).items()
    # the same scoring by the old model goes on, by another one it does not
    with pytest.raises(ChangedError, match=r"served: engine vllm, [\s\S]*canary \d+\.\d+ nats per token then, [\s\S]* now"):
        score(folder, by(asked, serve("vllm+changes-after=0")))
    score(folder, by(asked, serve("vllm")))
    assert losses_of(folder) == losses_of(local)


def test_losses_of_a_model_that_changes_within_a_shard_are_not_kept(
    serve: Serve, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)
    windows = windows_of(unscored, asked)
    for answers in (4, windows[0] + 1):  # the canaries at the start, and some windows; all windows but the last
        with pytest.raises(ServerLostError, match="another model answers"):
            score(folder, by(asked, serve(f"vllm+changes-after={answers}"), in_flight=1))
        assert not losses_of(folder)
    with pytest.raises(ServerLostError, match="another model answers"):  # in the last shard
        score(folder, by(asked, serve(f"vllm+changes-after={sum(windows) + 2 * len(windows)}"), in_flight=1))
    assert len(losses_of(folder)) == 2 * (len(windows) - 1)
    score(folder, by(asked, serve("vllm")))
    assert losses_of(folder) == losses_of(local)


def windows_of(data: AlignedDataset, asked: ScoringOptions) -> list[int]:
    """The number of windows of each shard."""
    assert asked.context and asked.stride
    lengths = [PairReader(data.path / shard.path / "teacher").lengths.astype("int64") for shard in data.manifest.shards]
    return [len(plan_windows(one, asked.context, asked.stride).document) for one in lengths]


def test_a_request_that_is_refused_ends_its_shard_with_the_servers_words(
    serve: Serve, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)
    with pytest.raises(CorpusError, match=r"shards could not be scored[\s\S]*400 [^.]*out of vocabulary") as refused:
        score(folder, by(asked, serve("vllm+refuses-after=9")))
    assert "Traceback" not in str(refused.value) and not losses_of(folder)


def test_losses_that_are_not_numbers_are_an_error_that_names_the_document(
    serve: Serve, corpus: Path, settings: BuildConfig, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy, tmp_path: Path
) -> None:
    """The document is that of the dataset, whichever documents of its shard are asked for."""
    texts = sorted(real.texts(), key=len)[:66]
    bigger = make([write_jsonl(tmp_path / "corpus.jsonl", texts)], tmp_path / "dataset", settings, shard_bytes=1 << 14)
    rare = token_of_one_document(bigger, [i for i in range(len(bigger)) if bigger.text(i) in texts[60:]])
    where = np.flatnonzero(bigger.teacher(rare.document) == rare.token)[0]
    first = sum(shard.totals.documents for shard in bigger.manifest.shards[:-1])
    assert 0 < first < rare.document
    known = copy(unscored)
    score(known, by(asked, serve("vllm")))
    for reuse in (None, known):
        with pytest.raises(CorpusError, match="Start the server with --dtype float32, or leave the document out") as refused:
            score(copy(bigger, f"reuse-{reuse is not None}"), by(asked, serve(f"vllm+nan-at={rare.token}")), reuse=reuse)
        found = re.search(
            r"document (\d+), teacher tokens (\d+) to (\d+): POST \S+ was refused: 400 .*Out of range", str(refused.value)
        )
        assert found is not None and int(found[1]) == rare.document and int(found[2]) - 1 <= where < int(found[3])


class Rare(NamedTuple):
    token: int
    document: int


def token_of_one_document(data: AlignedDataset, among: Sequence[int]) -> Rare:
    """A token that one of these documents has, and no other document and no canary."""
    counts = Counter(token for i in range(len(data)) for token in set(data.teacher(i).tolist()))
    canary = canary_prompt(data.teacher_tokenizer.path, (0,))
    return next(Rare(t, i) for i in reversed(among) for t in data.teacher(i).tolist() if counts[t] == 1 and t not in canary)


def test_a_request_without_an_answer_is_sent_again(
    serve: Serve, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy
) -> None:
    folder, url = copy(unscored), serve("sglang+stalls=2")
    impatient = replace(by(asked, url), servers=Servers((url,), timeout=1, in_flight=4, tries=4))
    score(folder, impatient)
    assert losses_of(folder) == losses_of(local)


def test_a_server_that_dies_leaves_the_finished_shards(
    teacher: Path, unscored: AlignedDataset, local: Path, asked: ScoringOptions, serve: Serve, copy: Copy
) -> None:
    folder = copy(unscored)
    first = windows_of(unscored, asked)[0]
    process, port = start([teacher])
    with pytest.raises(ServerLostError, match="no answer in 6 tries"):
        score(folder, by(asked, f"http://127.0.0.1:{port}/vllm+dies-after={first + 6}"))
    assert process.wait(30) == 1
    assert len(losses_of(folder)) == 2
    score(folder, by(asked, serve("vllm")))
    assert losses_of(folder) == losses_of(local)


def test_weights_that_only_the_server_has(
    serve: Serve, teacher: Path, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy, tmp_path: Path
) -> None:
    """Their fingerprint equals no weights', and no other name's."""
    description = tmp_path / "description"
    description.mkdir()
    for file in teacher.iterdir():
        if file.suffix != ".safetensors":
            (description / file.name).write_bytes(file.read_bytes())
    folder = copy(unscored)
    with pytest.raises(UserError, match="no weights in"):
        score(folder, replace(asked, teacher=description))
    with pytest.raises(ServerError, match="serves the weights at"):
        score(folder, replace(by(asked, serve("vllm")), teacher=description))
    score(folder, replace(by(asked, serve("vllm+elsewhere")), teacher=description))
    assert losses_of(folder) == losses_of(local)
    assert recorded(folder).scoring.teacher.startswith(SERVED)
    assert recorded(local).scoring.teacher == teacher_fingerprint(teacher)
    with pytest.raises(ChangedError, match=r"teacher: served:\w+ then, \w+ now"):
        score(folder, by(asked, serve("vllm")))
    # a run that names no weights reads them, and one that names weights does not
    data = [AlignedDataset.open(folder)]
    assert open_scored(Teacher(placement="cached"), data) == data
    assert open_scored(Teacher(path=Path("/gone/description"), placement="cached"), data) == data
    with pytest.raises(RunError, match=r"holds the losses of description \(served:\w+\), teacher.path is"):
        open_scored(Teacher(path=teacher, placement="cached"), data)


def test_served_weights_that_cannot_be_compared_are_not_recorded_as_those_of_the_teacher(
    serve: Serve, teacher: Path, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = by(asked, serve("vllm+elsewhere"))
    folder = copy(unscored, "not compared")
    score(folder, elsewhere)
    assert recorded(folder).scoring.teacher.startswith(SERVED)
    assert "To record them as those, give --check 8" in caplog.text
    folder = copy(unscored, "compared")
    score(folder, replace(elsewhere, check=2))
    assert recorded(folder).scoring.teacher == teacher_fingerprint(teacher)


def test_canaries_are_equal_up_to_rounding() -> None:
    one = Canary(losses=(1.0, 2.0))
    assert one == Canary(losses=(1.04, 2.05)) and one != Canary(losses=(1.2, 2.0))
    assert one != Canary(losses=(1.0,)) and one != Canary(losses=(1.0, float("nan")))


def test_the_served_losses_are_compared_with_those_of_this_process(
    serve: Serve, teacher: Path, other_teacher: Path, unscored: AlignedDataset, asked: ScoringOptions, copy: Copy
) -> None:
    found: list[Difference] = []
    score(copy(unscored, "right"), replace(by(asked, serve("vllm")), check=5), on_check=found.append)
    assert found[0].windows == 5 and found[0].tokens > 100 and found[0].mean == found[0].largest == 0
    folder = copy(unscored, "wrong")
    with pytest.raises(
        ServerError, match=r"does not give the losses of \S+ in float32\. 5 windows with \d+ tokens: mean difference"
    ):
        score(folder, replace(by(asked, serve("vllm+elsewhere")), teacher=other_teacher, check=5))
    assert not losses_of(folder)


def test_the_command(
    serve: Serve,
    teacher: Path,
    unscored: AlignedDataset,
    local: Path,
    asked: ScoringOptions,
    copy: Copy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy(unscored)
    words = [str(folder), "--teacher", str(teacher), "--context", str(asked.context), "--stride", str(asked.stride)]
    urls = ",".join(f"{serve('vllm+info')}{end}" for end in ("", "/v1", "/"))
    assert score_teacher.main([*words, "--server", urls, "--check", "3", "--verbose"]) == 0
    said = capsys.readouterr()
    assert losses_of(folder) == losses_of(local)
    assert "served and own losses of 3 windows with" in said.err + said.out
    assert "vllm 0.32.0, teacher" in said.out and recorded(folder).scoring.dtype == "float32"
    for more, error in (
        (["--server", urls, "--workers", "2"], "--workers 2 is for a teacher in this process, and --server is set"),
        (["--server", urls, "--placement", "zero3"], "--placement zero3 needs --teacher, and neither --server"),
        (["--check", "3"], "--check compares a server with this process: it needs --server"),
    ):
        assert score_teacher.main([*words, *more]) == 2
        assert error in capsys.readouterr().err
    assert score_teacher.main([str(folder), "--reuse", str(local), "--check", "3"]) == 2
    assert "--check is for a teacher, and there is no --teacher" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score_teacher.main([*words, "--server", "localhost:8000"])
    assert "'localhost:8000' is not a URL, for example http://localhost:8000" in capsys.readouterr().err


@pytest.mark.long
def test_killed_ten_times_it_ends_as_if_it_had_not_been(
    serve: Serve, teacher: Path, unscored: AlignedDataset, local: Path, asked: ScoringOptions, copy: Copy
) -> None:
    folder, url = copy(unscored), serve("vllm")
    command = [sys.executable, "-m", "tools.preprocess.score_teacher", str(folder), "--teacher", str(teacher), "--server", url]
    command += ["--context", str(asked.context), "--stride", str(asked.stride), "--dtype", "float32", "--in-flight", "2"]
    for kill in range(10):
        before = requests(url)
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and requests(url) < before + 1 + 7 * kill:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    assert losses_of(folder) == losses_of(local)
    assert not list(folder.rglob(".teacher_loss*"))
