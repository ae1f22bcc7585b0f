"""A table of how each command of the documentation is executed. The first rule that matches a command counts.

If a new command has no rule, `test_commands_run.py` fails and names it. Add a rule to RULES, the first of these that is possible:

- `Here`: the test runs it in a folder with the files that it names (`execution.furnish`). `small`: replacements to make it small
- `There`: another test or script runs it. Name it, and words of the command that it contains, so that a change is noticed
- `Checked`: it cannot run in a test, for the given reason. One of the checks of `checks.py` comes as near as possible
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.docs import checks
from tests.docs.commands import Command
from tests.docs.execution import parse

Replacements = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Here:
    small: Replacements = ()


@dataclass(frozen=True)
class There:
    """by: FILE::TEST, or a script. words: each is in the command, and in that file or in `script`, which the file runs."""

    by: str
    words: tuple[str, ...]
    script: str = ""


@dataclass(frozen=True)
class Checked:
    """why: the command does not run here for this reason. given: replacements before the check."""

    check: Callable[[str], None]
    why: str
    given: Replacements = ()


@dataclass(frozen=True)
class Rule:
    """files: the rule applies only to commands in files that match this pattern."""

    pattern: str
    how: Here | There | Checked
    files: str = ""

    def fits(self, command: Command) -> bool:
        return re.match(self.files, command.file) is not None and re.match(self.pattern, command.text) is not None


def replaced(text: str, replacements: Replacements) -> str:
    """Each replacement must change something. Otherwise the table is about a command that no longer exists."""
    for old, new in replacements:
        assert old in text, f"{old!r} is no longer in the command: {text}"
        text = text.replace(old, new)
    return text


BUILD = r"python -m tools\.preprocess\.build_dataset "
SCORE = r"python -m tools\.preprocess\.score_teacher "
TRAIN = r"(deepspeed|python) (--num_gpus \w+ )?examples/pretrain_vocagno\.py "
ARRAY = (("--out DIR", "--out ARRAY"),)  # DIR is the page's first dataset
PLANNED = (("ds_configs/X.json", "ds_configs/gpu_zero1_bf16.json"),)
NO_CLUSTER = "it needs machines that are reached by ssh"
MINUTES = "it takes minutes, an hour, or a GPU"

INSTALLING = (
    Rule(r"make test$", There(".ci/run", ("make test",))),
    Rule(r"make lint$", There(".ci/run", ("make lint",))),
    Rule(r"make docs(-links)?$", Checked(checks.make_has, "it needs packages that tests do without, and a network")),
    Rule(r"make [a-z-]+( REV=\S+)?$", Checked(checks.make_has, MINUTES)),
    Rule(r"(python -m )?pip install ", Checked(checks.pip_finds, "it would change the environment that the tests run in")),
    Rule(r"python -m pytest ", Checked(checks.names_files, "the suite runs them")),
    Rule(r"source \.venv/bin/activate$", There("Makefile", (".venv",))),
)

RELEASING = (
    Rule(r"\.ci/[a-z]+$", Checked(checks.is_a_script, "it installs packages from an index, for minutes")),
    # the names of commands in docs/install.md
    Rule(r"pip freeze ", Checked(checks.shell_reads, "it is for the user's environment")),
    Rule(r"python (-m (tools|megatron_vocagno)\.[a-z_.]+|examples/pretrain_vocagno\.py)$", Checked(checks.prints_help, "a name")),
    Rule(r"DS_BUILD_OPS=0 pip wheel ", Checked(checks.shell_reads, "it needs an index")),
    Rule(r"pip download ", Checked(checks.names_files, "it needs an index")),
    Rule(r"deepspeed --module( megatron_vocagno\.pretrain)?$", There(".ci/release", ("deepspeed", "--module"))),
    Rule(r"deepspeed examples/pretrain_vocagno\.py$", There("benchmarks/soak.py", ("deepspeed",))),
)

SHOWN_AGAIN = (
    Rule(
        r"(python|deepspeed|torchrun) ",
        Checked(parse, "pages show the same commands and run them"),
        r"(megatron_vocagno|tools/preprocess/(build|score|report|show))",
    ),
    Rule(
        r"deepspeed --num_gpus |python -m (tools\.preprocess|megatron_vocagno)\.",
        Checked(
            parse, "README.md, docs/first_run.md, docs/preprocessing.md and docs/clusters.md show the same commands and run them"
        ),
        r"docs/(reference|training)\.md",
    ),
    Rule(
        r"deepspeed --num_gpus |python -m megatron_vocagno\.export ",
        Checked(parse, "README.md shows the same commands and runs them"),
        r"docs/monitoring\.md",
    ),
)

DATA = (
    Rule(rf"{BUILD}verify", Here()),
    Rule(rf"{BUILD}finalize", Here(ARRAY)),
    Rule(rf"{BUILD}merge A B", Here()),
    Rule(
        rf"{BUILD}… ",
        Checked(parse, "tests/preprocess/test_engines.py has a cluster", (("…", "I --student S --teacher T --out D"),)),
    ),
    Rule(rf"{BUILD}corpus\.jsonl .* --out data/first --workers 8", Here(((" --workers 8", " --workers 1"),))),
    Rule(rf"{BUILD}.* --workers 64", Here(((" --workers 64", " --workers 1"),))),
    Rule(rf"{BUILD}.* --workers 2 ", Here(((" --workers 2 ", " --workers 1 "),))),
    Rule(BUILD, Here()),
    Rule(rf"srun {BUILD}", Here((("srun ", ""), ("$SLURM_ARRAY_TASK_ID/64", "1/1"), (" --workers 8", " --workers 1"), *ARRAY))),
    Rule(r"python -m tools\.preprocess\.show_document DATASET \[N", Here()),
    Rule(r"python -m tools\.preprocess\.show_document ", Here()),
    Rule(r"python -m tools\.preprocess\.report ", Here()),
    Rule(
        r"python -m tools\.convert\.gguf_to_safetensors ",
        There("tests/model/test_gguf.py::test_the_command_writes_half_precision_and_never_over_a_folder", ("--out",)),
    ),
    Rule(
        r"build_dataset verify$", There("tests/preprocess/test_build_dataset.py::test_verify_names_what_is_damaged", ("verify",))
    ),
    Rule(
        r"build_dataset … --student$",
        Checked(
            parse,
            "in short",
            (("build_dataset …", "python -m tools.preprocess.build_dataset I --out D --teacher T"), ("--student", "--student S")),
        ),
    ),
    Rule(
        r"build_dataset ",
        Checked(parse, "in short", (("build_dataset ", "python -m tools.preprocess.build_dataset I --out D "),)),
    ),
)

SCORING = (
    Rule(rf"{SCORE}SECOND --reuse FIRST$", There("tests/preprocess/scoring/test_reuse.py", ("reuse",))),
    Rule(
        rf"{SCORE}DATASET --teacher FOLDER --server ",
        There("tests/serving/test_served_scoring.py::test_the_command", ("--teacher", "--server")),
    ),
    Rule(rf"{SCORE}texts ", Here((("'texts/*.jsonl'", "corpus.jsonl"), (" --id-key url", "")))),
    Rule(SCORE, Here()),
    Rule(
        r"torchrun .*score_teacher DATASET --teacher T --placement zero3$",
        There("tests/preprocess/scoring/test_sharded.py", ("tools.preprocess.score_teacher", "--placement", "zero3")),
    ),
    Rule(r"torchrun … --placement zero3$", There("tests/preprocess/scoring/test_sharded.py", ("--placement", "zero3"))),
    Rule(
        r"vllm serve FOLDER |python -m sglang\.launch_server ",
        Checked(checks.shell_reads, "a server of another project, which needs an environment of its own"),
    ),
    Rule(r"torchrun --nproc_per_node 8 -m tools\.preprocess\.score_teacher ", Here()),
    Rule(r"score_teacher finalize DATASET$", Here((("score_teacher", "python -m tools.preprocess.score_teacher"),))),
    Rule(r"score_teacher ", Checked(parse, "in short", (("score_teacher", "python -m tools.preprocess.score_teacher"),))),
    Rule(
        r"deepspeed --module tools\.preprocess\.score_teacher …$",
        Checked(parse, "torchrun starts the same", (("…", "DATASET --teacher T"),)),
    ),
    Rule(
        r"… --server URL$",
        Checked(parse, "in short", (("…", "python -m tools.preprocess.score_teacher DATASET --teacher T"), ("URL", "http://h"))),
    ),
    Rule(r"… --", Checked(parse, "in short", (("…", "python -m tools.preprocess.score_teacher DATASET --teacher T"),))),
)

TRAINING = (
    Rule(
        rf"{TRAIN}examples/quickstart\.toml",
        Here((("training.steps=5", "training.steps=1 --set eval.rows=2 --set data.row_length=64"),)),
    ),
    Rule(
        rf"{TRAIN}examples/evidence/arms/guided\.toml",
        Here((("row_length=256", "row_length=64"), ("training.steps=3", "training.steps=1"))),
    ),
    Rule(
        rf"{TRAIN}examples/recipes/.* --dry-run",
        There(
            "tests/examples/test_recipes.py::test_every_command_that_is_shown_dry_runs",
            ("examples/pretrain_vocagno.py", "--dry-run"),
        ),
    ),
    Rule(rf"{TRAIN}examples/recipes/", Checked(checks.resolves, "models of billions of parameters, on GPUs")),
    Rule(
        rf"{TRAIN}mine\.toml ",
        Here((("--num_gpus 8", "--num_gpus 1"), ("mine.toml", "RUN.toml"), ("ds_configs/gpu_zero1_bf16.json", "X.json"))),
    ),
    Rule(rf"{TRAIN}first\.toml .* --dry-run", Here()),
    Rule(rf"{TRAIN}first\.toml ", Here()),
    Rule(rf"{TRAIN}RUN\.toml .* --dry-run --gpus N", Here((*PLANNED, ("--gpus N", "--gpus 8")))),
    Rule(rf"{TRAIN}RUN\.toml .* --dry-run", Here(PLANNED)),
    Rule(r"deepspeed --master_port( \d+)?$", There("benchmarks/soak.py", ("--master_port",))),
    Rule(r"python -m megatron_vocagno\.plan RUN", Here(PLANNED)),
    Rule(r"python -m megatron_vocagno\.plan ", Here()),
    Rule(r"python -m megatron_vocagno\.export ", Here()),
    Rule(r"tensorboard --logdir ", Here((("--logdir", "--inspect --logdir"),))),
)

CLUSTERS = (
    Rule(
        r"array=\$\(sbatch|sbatch --dependency",
        There(
            "tests/examples/launch/test_slurm.py::test_an_array_makes_the_dataset_of_one_process",
            ("preprocess",),
            "examples/launch/slurm/preprocess.sbatch",
        ),
    ),
    Rule(
        r"sbatch --array=1-16 .*score\.sbatch",
        There("tests/examples/launch/test_slurm.py::test_an_array_scores_a_dataset", ("--array=1-16",)),
    ),
    Rule(
        r"sbatch --array=1-4 .*score_served\.sbatch",
        There(
            "tests/examples/launch/test_slurm.py::test_an_array_scores_with_a_server_in_each_task",
            ("score_served.sbatch", "--teacher"),
        ),
    ),
    Rule(
        r"sbatch --nodes=4 .*train\.sbatch",
        There(
            "tests/examples/launch/test_slurm.py::test_a_run_that_was_stopped_goes_on_to_its_end", ("--nodes=4", "train.sbatch")
        ),
    ),
    Rule(
        r"scancel ",
        There(
            "tests/examples/launch/test_slurm.py::test_a_cancelled_run_stays_away_and_a_signalled_one_comes_back", ("scancel ",)
        ),
    ),
    Rule(r"export HF_HOME=", Checked(checks.shell_reads, "a folder of yours")),
    Rule(r"docker run --shm-size", Checked(checks.shell_reads, "an option of Docker's, and no image here")),
    Rule(r"hf download$", Checked(checks.hf_understands, "it needs a network", (("download", "download org/name"),))),
    Rule(r"hf download ", Checked(checks.hf_understands, "it needs a network")),
    Rule(r"cp ds_configs/", Here()),
    Rule(
        r"cp examples/launch/",
        There("tests/examples/launch/test_hostfile.py::test_two_machines_by_pdsh_train_as_one", ("cp examples/launch/hostfile",)),
    ),
    Rule(
        r"mv deepspeed_env|deepspeed --hostfile",
        There("tests/examples/launch/test_hostfile.py::test_two_machines_by_pdsh_train_as_one", ("deepspeed",)),
    ),
    Rule(
        r"(ssh|pdsh) .*pkill",
        There(
            "tests/examples/launch/test_run_forever.py::test_where_all_ranks_run_elsewhere_it_says_how_to_reach_one_and_waits",
            ("pkill", "--local_rank="),
            "examples/launch/run_forever.sh",
        ),
    ),
    Rule(
        r"(examples/launch/)?run_forever\.sh OUTPUT node\.sh …$",
        There(
            "tests/examples/launch/test_run_forever.py::test_a_script_on_each_machine_bears_a_lost_rank_and_a_signal",
            ("run_forever.sh", "node.sh"),
        ),
    ),
    Rule(
        r"examples/launch/run_forever\.sh OUTPUT deepspeed",
        There(
            "tests/training/test_faults.py::test_the_supervisor_passes_a_signal_on_to_the_ranks",
            ("run_forever.sh", "deepspeed"),
            "benchmarks/soak.py",
        ),
    ),
    Rule(
        r"NODES=2 NODE_RANK=0 RANKS=8 .*node\.sh",
        There(
            "tests/examples/launch/test_node.py::test_ranks_know_their_places",
            ("NODES", "NODE_RANK", "RANKS", "MASTER_ADDR", "node.sh"),
        ),
    ),
    Rule(
        r"kubectl apply",
        There("tests/examples/launch/test_kubernetes.py::test_manifests_follow_the_published_schemas", ("kubernetes",)),
    ),
    Rule(
        r"kubectl create configmap run-file",
        There(
            "tests/examples/launch/test_kubernetes.py::test_a_mistake_fails_the_job_at_once",
            ("run.toml", "deepspeed.json", "run-file"),
        ),
    ),
    Rule(
        r"kubectl logs ",
        There(
            "tests/examples/launch/test_kubernetes.py::test_the_parts_of_the_job_fit_together",
            ("batch.kubernetes.io/job-completion-index",),
        ),
    ),
    Rule(
        r"kubectl delete job ",
        There(
            "tests/examples/launch/test_kubernetes.py::test_a_drained_pod_ends_all_pods_so_that_all_come_again",
            ("pretrain",),
            "examples/launch/kubernetes/train.yaml",
        ),
    ),
    Rule(
        r"ray exec ",
        There(
            "tests/examples/launch/test_ray.py::test_the_documented_command_makes_the_dataset_of_one_process",
            ("ray exec", "CORPUS", "STUDENT", "TEACHER", "DATA"),
        ),
    ),
    Rule(r"ray (start|up|exec)$", Checked(checks.ray_knows, NO_CLUSTER)),
    Rule(r"(RAY_AUTH_MODE=token )?ray ", Checked(checks.ray_understands, NO_CLUSTER)),
    Rule(r"aws s3 sync", Checked(checks.shell_reads, "no bucket of Amazon's; tests/corpus/test_places.py starts its own server")),
)

LOOKING = (
    Rule(
        r"examples/evaluate\.sh \.demo",  # with the tasks that are in the repository
        There(
            "tests/examples/test_evaluate.py::test_results_of_a_run_are_those_of_plain_transformers_on_its_export",
            ("evaluate.sh", "word_problems_cot,word_problems_choice,word_problems_answer", "--device"),
        ),
    ),
    Rule(r"examples/evaluate\.sh ", Checked(checks.evaluation_takes, "it downloads its tasks")),
    Rule(
        r"(git clone|python math_eval\.py) ", Checked(checks.shell_reads, "an external harness, which needs a GPU and a network")
    ),
    Rule(
        r"torchrun .*examples/megatron/pretrain_vocagno\.py ",
        Checked(checks.megatron_takes, "Megatron-LM's trainer needs GPUs; tests/megatron runs its parts"),
    ),
    Rule(r"accelerate launch$", There("examples/evaluate.sh", ("accelerate",))),
    Rule(r"python -m examples\.evidence", Checked(parse, "an hour; tests/examples/evidence runs its parts")),
    Rule(
        r"python examples/with_hf_trainer\.py",
        There("tests/library/test_hf_trainer.py::test_the_command_trains_and_saves_a_model", ("with_hf_trainer",)),
    ),
    Rule(r"python \.ci/licenses\.py$", Checked(checks.names_files, "it writes the page, of the packages that are installed")),
    Rule(r"python examples/demo/story\.py$", There("Makefile", ("examples/demo/story.py",))),
    Rule(r"python examples/demo/corpus\.py ", There("examples/demo/story.py", ("examples/demo/corpus.py", "--out"))),
    Rule(r"python -m benchmarks\.", Checked(parse, "minutes; tests run the quick forms")),
)

RULES = INSTALLING + RELEASING + SHOWN_AGAIN + DATA + SCORING + TRAINING + CLUSTERS + LOOKING


def rule_of(command: Command) -> Rule | None:
    """The first rule that fits."""
    return next((rule for rule in RULES if rule.fits(command)), None)
