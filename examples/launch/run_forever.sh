#!/usr/bin/env bash
# Restart a training command until it has finished, was stopped, or ended with an error that you must fix.
#
#   examples/launch/run_forever.sh OUTPUT deepspeed --num_gpus 8 examples/pretrain_vocagno.py RUN.toml --deepspeed_config X.json
#
# OUTPUT is the run's 'output' folder. SIGTERM and SIGUSR1 are forwarded to the ranks: they save and exit, and so does this script.
# Do not signal the launcher itself: it would kill its ranks, or leave them behind (docs/training.md). The script cannot reach ranks
# on other machines; docs/clusters.md has the command for them.
#
# Exit code 0: the run has finished or was stopped; OUTPUT/finished or OUTPUT/stopped exists. 2: an error that you must fix, printed
# by the training command, also under torchrun, which hides the exit codes of its ranks. 130: Ctrl-C. 1: the command failed RUN_FOREVER_TRIES times in a row without a newer checkpoint; the wait
# between attempts grows.
set -um # m: the command gets its own process group, so that Ctrl-C does not reach its ranks

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    # print the comment above without its number signs
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
fi
if [ $# -lt 2 ]; then
    echo "usage: $0 OUTPUT COMMAND..." >&2
    exit 2
fi
output=$1
shift
tries=${RUN_FOREVER_TRIES:-5}
seconds=${RUN_FOREVER_SECONDS:-10}
command=0
asked=""

newest() {
    cat "$output/checkpoints/latest" 2>/dev/null
}

# torchrun ends with 1, whatever the exit codes of its ranks are. A rank on this machine that ends with 2 writes it to this file
MEGATRON_VOCAGNO_EXIT_CODE_FILE=$(mktemp) || exit 1
export MEGATRON_VOCAGNO_EXIT_CODE_FILE
trap 'rm -f "$MEGATRON_VOCAGNO_EXIT_CODE_FILE"' EXIT

# a launcher may start its ranks in separate process groups and sessions, and they lose their parent when it dies. Only their
# environment identifies them
id=$(cat /proc/sys/kernel/random/uuid)
processes() {
    grep -lszxF "RUN_FOREVER_ID=$id" /proc/[0-9]*/environ | cut -d / -f 3
}

# ranks, and a command without a launcher, if they catch SIGUSR1: it would kill a process that does not
listening() {
    local pid caught
    for pid in $(processes); do
        [ "$pid" -eq "$command" ] || grep -qsz '^RANK=' "/proc/$pid/environ" || continue
        caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
        [ $((16#${caught:-0} >> ($(kill -l USR1) - 1) & 1)) -eq 0 ] || echo "$pid"
    done
}

# shellcheck disable=SC2329 # called by the traps below
forward_signal() {
    local found patience=10
    while [ "$command" -ne 0 ] && kill -0 "$command" 2>/dev/null; do
        found=$(listening)
        # shellcheck disable=SC2086 # one word per process
        [ -z "$found" ] || { kill -s "$1" $found 2>/dev/null && return; }
        # a launcher needs some time to start its ranks
        patience=$((patience - 1))
        if [ $patience -eq 0 ]; then
            echo "run_forever: no rank on this machine handles signals yet, so none was signalled; waiting." \
                "If all ranks run on other machines:" \
                "ssh HOST \"pkill -USR1 -f '[p]retrain.* --local_rank=0'\"" >&2
        fi
        sleep 1
    done
}

# kill until no process is left: the next start needs their files and GPUs
kill_remaining() {
    local left
    kill -s KILL -- "-$1" 2>/dev/null
    while left=$(processes) && [ -n "$left" ]; do
        # shellcheck disable=SC2086
        kill -s KILL $left 2>/dev/null
        sleep 0.2
    done
}

# `wait` returns early when a signal is forwarded. For a command that has ended, it can be called repeatedly for the exit code
ended() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1"
}

trap 'asked=SIGTERM; forward_signal TERM' TERM
trap 'asked=SIGUSR1; forward_signal USR1' USR1
trap 'asked=SIGINT; forward_signal TERM' INT

failures=0
while [ -z "$asked" ]; do
    before=$(newest)
    rm -f "$output/finished" "$output/stopped"
    : >"$MEGATRON_VOCAGNO_EXIT_CODE_FILE"
    RUN_FOREVER_ID=$id "$@" &
    command=$!
    [ -z "$asked" ] || forward_signal TERM # the signal came before the line above
    ended $command
    code=$?
    kill_remaining $command
    command=0

    # `deepspeed` also exits with 0 if its helper was killed, so check the run's own files. 75: node.sh, if the run was stopped
    if { [ $code -eq 0 ] || [ $code -eq 75 ]; } && { [ -f "$output/finished" ] || [ -f "$output/stopped" ]; }; then
        [ "$asked" = SIGINT ] && exit 130
        exit 0
    fi
    [ "$(cat "$MEGATRON_VOCAGNO_EXIT_CODE_FILE" 2>/dev/null)" != 2 ] || code=2
    case $code in 2 | 130) exit $code ;; esac
    if [ -n "$asked" ]; then
        echo "run_forever: stopped by $asked, but the command failed with exit code $code; newest checkpoint: ${before:-none}" >&2
        exit 1
    fi

    if [ "$(newest)" = "$before" ]; then
        failures=$((failures + 1))
    else
        failures=0
    fi
    [ -d "$output" ] || echo "run_forever: $output does not exist. Is it the run's 'output' folder?" >&2
    echo "run_forever: the command ended with exit code $code before the run finished; newest checkpoint: $(newest)," \
        "${failures} failures in a row without a newer one" >&2
    if [ $failures -ge "$tries" ]; then
        echo "run_forever: giving up after repeated failures. See the last error above" >&2
        exit 1
    fi
    if [ $failures -gt 0 ]; then
        sleep $((seconds * failures)) &
        wait $! # a signal ends the wait
    fi
done
echo "run_forever: stopped by $asked between two starts" >&2
[ "$asked" = SIGINT ] && exit 130
exit 0
