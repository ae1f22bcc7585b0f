"""The Ray cluster file against Ray's own schema and parser, and the documented command on a real cluster of this machine."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError, validate

from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents
from tests.examples.launch.conftest import documented
from tests.preprocess.ray_cluster import Cluster
from tests.runs import REPOSITORY, Case, environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

FILE = REPOSITORY / "examples" / "launch" / "ray" / "cluster.yaml"


def cluster_file() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return read


def test_the_cluster_file_follows_rays_schema() -> None:
    schema = json.loads((real.package_folder("ray") / "autoscaler" / "ray-schema.json").read_text())
    validate(cluster_file(), schema)
    with pytest.raises(ValidationError, match="worker_commands"):
        validate(cluster_file() | {"worker_commands": []}, schema)


def test_ray_understands_the_commands_that_start_it() -> None:
    from ray.scripts.scripts import start

    met = []
    for where in ("head", "worker"):
        for command in cluster_file()[f"{where}_start_ray_commands"]:
            if options := re.search(r"(\S*) ray start (.*)", command):
                parsed = start.make_context("ray start", options[2].replace("$RAY_HEAD_IP", "10.0.0.1").split()).params
                assert options[1] == "RAY_AUTH_MODE=token" and parsed["disable_usage_stats"]
                met.append((parsed["head"], parsed["address"]))
    assert met == [(True, None), (False, f"{cluster_file()['provider']['head_ip']}:6379")]


@pytest.mark.long
@pytest.mark.slow
def test_the_documented_command_makes_the_dataset_of_one_process(case: Case, teacher_tokenizer: Path, tmp_path: Path) -> None:
    words = {
        "cd /workspace && . .venv/bin/activate && ": "",
        "CORPUS": f"{case.train.parent / 'corpus.jsonl'} --shard-mb {100_000 / 2**20}",
        "STUDENT": str(real.mistral_tokenizer_path()),
        "TEACHER": str(teacher_tokenizer),
        "DATA": str(tmp_path / "dataset"),
    }
    (commands,) = documented("Ray", words)
    (command,) = re.findall("ray exec .* '(.*)'", commands)
    cluster = Cluster()
    try:
        variables = environment() | cluster.environment | {"RAY_ADDRESS": cluster.address}
        finished = subprocess.run(
            ["bash", "-c", command], cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=200, check=False
        )
    finally:
        cluster.end()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert contents(tmp_path / "dataset") == contents(case.train)
