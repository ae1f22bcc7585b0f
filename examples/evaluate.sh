#!/usr/bin/env bash
# Few-shot accuracies of a student, by lm-eval-harness: docs/monitoring.md
#
#   examples/evaluate.sh RUN_OR_HF_FOLDER [OUT] [--tasks A,B] [--shots N] [--limit N] [--device cuda|cpu|...]
#                        [--batch-size N|auto] [--gpus N] [--include-path FOLDER]
#
# RUN_OR_HF_FOLDER: a run's output folder, whose newest whole checkpoint is exported for the while, or a Hugging Face folder.
# OUT (default: RUN_OR_HF_FOLDER/evaluation) receives NAME_DATE.json with the results, samples_TASK_DATE.jsonl with every prompt
# and answer, and NAME.txt, the table that is printed. NAME is the checkpoint's, or the folder's. --include-path: more tasks, in
# lm-eval's YAML, in the place of those beside this script. Exit code 0: the results are there. 2: a mistake, as explained.
set -euo pipefail

# those of the paper's nine benchmarks that lm-eval has, as few-shot chain of thought where it has that
tasks=gsm8k_cot,minerva_math,asdiv_cot_llama,mathqa,mmlu_stem_cot,agieval_sat_math
# a base model that has answered goes on with a question of its own, and not all of these tasks stop there
generation='{"until": ["Q:", "Problem:", "Given the following problem", "</s>"]}'

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
include=$repository/examples/evaluate
batch=8 gpus=1 options=() folders=()
while (($#)); do
    if [[ $1 == -h || $1 == --help ]]; then
        # what stands above, without its signs
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
    fi
    if [[ $1 != --* ]]; then
        folders+=("$1")
        shift
        continue
    fi
    (($# > 1)) || fail "$1 needs a value"
    case $1 in
        --tasks) tasks=$2 generation="" ;;
        --shots) [[ $2 =~ ^[0-9]+$ ]] || fail "--shots is a number of examples, not '$2'" ;;&
        --limit) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--limit is a number of problems of each task, not '$2'" ;;&
        --batch-size) [[ $2 =~ ^([1-9][0-9]*|auto)$ ]] || fail "--batch-size is a number or auto, not '$2'" ;;&
        --gpus) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--gpus is a number of processes, one a GPU, not '$2'" ;;&
        --include-path) [[ -d $2 ]] || fail "--include-path: there is no folder '$2'" ;;&
        --shots) options+=(--num_fewshot "$2") ;;
        --limit) options+=(--limit "$2") ;;
        --batch-size) batch=$2 ;;
        --gpus) gpus=$2 ;;
        --include-path) include=$(realpath "$2") ;;
        --device) options+=(--device "$2") ;;
        *) fail "no option $1; there are --tasks --shots --limit --device --batch-size --gpus --include-path" ;;
    esac
    shift 2
done
((${#folders[@]} == 1 || ${#folders[@]} == 2)) || fail "usage: $0 RUN_OR_HF_FOLDER [OUT] [--tasks A,B] ..., see its first lines"
[[ -d ${folders[0]} ]] || fail "there is no folder '${folders[0]}'"
model=$(realpath "${folders[0]}")
[[ -d $model/checkpoints || -f $model/config.json ]] ||
    fail "$model has neither 'checkpoints' nor 'config.json': it is no run's output folder, and no Hugging Face folder"

[[ -n $(command -v python) ]] ||
    fail "there is no python: activate the environment that 'make install' has built, 'source $repository/.venv/bin/activate'"
# the harness lies in a folder of its own, where no training run imports it
beside=$(python -c 'import sys; print(sys.prefix)')/evaluation
[[ ! -d $beside ]] || export PYTHONPATH="$beside${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)' ||
    fail "lm-eval-harness is not installed for $(command -v python):
  python -m pip install --no-deps --target '$beside' --requirement '$repository/requirements/evaluation.txt'"

out=$(realpath -m "${folders[1]:-$model/evaluation}")
cd "$repository" # the package is found without installation, and the tasks name their files from here
# as the harness itself looks for them, but before anything is exported
ask='
import sys
from lm_eval.config.evaluate_config import EvaluatorConfig

try:
    EvaluatorConfig(tasks=[sys.argv[1]], include_path=sys.argv[2]).process_tasks()
except ValueError as error:
    print(error)'
unknown=$(python -c "$ask" "$tasks" "$include")
[[ -z $unknown ]] || fail "$unknown
  These are there: PYTHONPATH='$beside' python -m lm_eval ls tasks --include_path '$include'"
mkdir -p "$out" || fail "$out cannot be written"
name=$(basename "$model")
temporary=()
trap 'rm -rf "${temporary[@]}"' EXIT
if [[ -d $model/checkpoints ]]; then
    exported=$(mktemp -d "$out/exported-XXXXXX")
    temporary+=("$exported")
    told=$(python -m megatron_vocagno.export "$model" --out "$exported")
    name=$(basename "${told%% -> *}")
    model=$exported
fi

harness=(python -m lm_eval)
if ((gpus > 1)); then
    harness=(python -m accelerate.commands.launch --multi_gpu --num_processes "$gpus" --num_machines 1)
    harness+=(--mixed_precision no --dynamo_backend no -m lm_eval)
fi
[[ -z $generation ]] || options+=(--gen_kwargs "$generation")
# as JSON, where a path may hold commas and equals signs
arguments=$(python -c 'import json, sys; print(json.dumps({"pretrained": sys.argv[1]}))' "$model")
started=$(mktemp "$out/.started-XXXXXX")
temporary+=("$started")
"${harness[@]}" run --model hf --model_args "$arguments" --tasks "$tasks" --include_path "$include" --batch_size "$batch" \
    --output_path "$out/$name.json" --log_samples "${options[@]}" | tee "$out/$name.txt"
# a harness that could not write says so in its log, and exits 0
written=$(find "$out" -maxdepth 1 -name '*.json' -newer "$started")
[[ -n $written ]] || fail "lm-eval has written no results into $out: its log above says why"
echo "$written"
