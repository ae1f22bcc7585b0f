"""The Kubernetes manifests: against Kubernetes' own schemas, and the pods' command run here as a kubelet would run it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import kubernetes_validate
import pytest
import yaml

from megatron_vocagno.errors import UserError
from megatron_vocagno.preprocess.plan import Slice
from tests.examples.launch.conftest import RUN, group, has_done, losses, wait_for
from tests.runs import REPOSITORY, Case, environment, free_port
from tools.preprocess import score_teacher

FOLDER = REPOSITORY / "examples" / "launch" / "kubernetes"
OLDEST, NEWEST = "1.31", "1.37"


def manifests() -> list[dict[str, Any]]:
    return [document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]


def job(name: str = "pretrain") -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests() if manifest["kind"] == "Job" and manifest["metadata"]["name"] == name)
    return found


def container() -> dict[str, Any]:
    (only,) = job()["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_follow_the_published_schemas(version: str) -> None:
    kinds = set()
    for manifest in manifests():
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
        kinds.add(manifest["kind"])
    assert kinds == {"Job", "Service", "PersistentVolumeClaim"}


def test_the_schema_refuses_a_misspelt_field() -> None:
    manifest = job()
    manifest["spec"]["completionsMode"] = manifest["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionsMode"):
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_the_parts_of_the_job_fit_together() -> None:
    """What no schema knows."""
    spec, env = job()["spec"], {variable["name"]: variable for variable in container()["env"]}
    (service,) = (manifest for manifest in manifests() if manifest["kind"] == "Service")
    name = job()["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] == int(env["NODES"]["value"])
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == int(env["RANKS"]["value"])
    # a pod of an Indexed Job is called JOB-INDEX, and found as POD.SERVICE where the template names the service as its subdomain
    assert env["MASTER_ADDR"]["value"] == f"{name}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    # a dead pod takes the others with it: what counts them together would end a Job of many pods at its first accident
    assert "backoffLimit" not in spec and spec["backoffLimitPerIndex"] > 0 and spec["maxFailedIndexes"] == 0
    rules = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {rule["containerName"] for rule in rules} == {container()["name"]}
    volumes = spec["template"]["spec"]["volumes"]
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in volumes}
    claimed = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
    assert claimed == {manifest["metadata"]["name"] for manifest in manifests() if manifest["kind"] == "PersistentVolumeClaim"}


def test_the_parts_of_the_scoring_job_fit_together() -> None:
    spec = job("score")["spec"]
    [vllm], [scoring] = (spec["template"]["spec"][kind] for kind in ("initContainers", "containers"))
    env = {variable["name"]: variable.get("value") for variable in scoring["env"]}
    assert spec["completions"] == spec["parallelism"] == int(env["PARTS"])
    # without this it would have to end before the scoring starts
    assert vllm["restartPolicy"] == "Always"
    flags = dict(argument.split("=") for argument in vllm["args"] if "=" in argument)
    assert int(flags["--tensor-parallel-size"]) == vllm["resources"]["limits"]["nvidia.com/gpu"]
    words = scoring["args"][0].replace('"$((INDEX + 1))/$PARTS"', "2/4").split()[1:]
    options = score_teacher.parser().parse_args(words[1:])
    assert words[0] == "vocagno-score" and str(options.teacher) == vllm["args"][0] and options.shards == Slice(2, 4)
    [server] = options.server
    assert f"{server}/health" in vllm["startupProbe"]["exec"]["command"][-1] and flags["--host"] in server
    assert int(flags["--max-model-len"]) == options.context + 8
    (rule,) = (rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
    assert rule["containerName"] == scoring["name"] and rule["values"] == [UserError.exit_code]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for one in (vllm, scoring) for mount in one["volumeMounts"]} == volumes


@contextmanager
def pods(arguments: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Both pods of the Job, with one rank each: the container's command and variables, the files where the test has them."""
    run, _, settings, *overrides = arguments
    mounted = {"/run-file/run.toml": run, "/run-file/deepspeed.json": settings}
    command = [mounted.get(word, word) for word in container()["command"]] + overrides
    here = environment(MASTER_PORT=str(free_port()))
    with ExitStack() as stack:
        yield [
            stack.enter_context(group(command, cwd=REPOSITORY, env=here | variables(index, here["MASTER_PORT"])))
            for index in range(job()["spec"]["completions"])
        ]


def variables(index: int, port: str) -> dict[str, str]:
    values = {}
    for variable in container()["env"]:
        if "value" in variable:
            values[variable["name"]] = variable["value"]
        else:
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            values[variable["name"]] = str(index)
    return values | {"RANKS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.mark.long
@pytest.mark.slow
def test_a_drained_pod_ends_all_pods_so_that_all_come_again(case: Case, one_host: dict[int, float]) -> None:
    """SIGTERM to one: both save, and end with the code for which the Job starts them again."""
    again = [
        rule["onExitCodes"]["values"]
        for rule in job()["spec"]["podFailurePolicy"]["rules"]
        if rule["action"] == "Ignore" and "onExitCodes" in rule
    ]
    arguments, output = case.command("kubernetes", RUN), case.out("kubernetes")
    with pods(arguments) as both:
        wait_for(lambda: has_done(output, 3))
        both[1].terminate()
        assert [[pod.wait(timeout=300)] for pod in both] == again * 2
    done = losses(output)
    assert 3 <= len(done) < len(one_host) and done == {step: one_host[step] for step in done}
    assert (output / "checkpoints" / "latest").read_text().strip().endswith(f"{len(done):08}")


@pytest.mark.slow
def test_a_mistake_fails_the_job_at_once(case: Case) -> None:
    (code,) = (
        rule["onExitCodes"]["values"] for rule in job()["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"
    )
    with pods(case.command("kubernetes-mistake", ["guidance.kep=0.3"])) as both:
        assert [[pod.wait(timeout=300)] for pod in both] == [code, code]
