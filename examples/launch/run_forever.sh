#!/usr/bin/env bash
# Start a training command again until it has finished, was asked to stop, or meets something that you must mend.
#
#   examples/launch/run_forever.sh OUTPUT deepspeed --num_gpus 8 examples/pretrain_vocagno.py RUN.toml --deepspeed_config X.json
#
# OUTPUT is the run's 'output' folder. SIGTERM and SIGUSR1 go on to the ranks: they save and leave, and so does this script.
# The launcher itself must not be signalled: it would kill its ranks, or leave them behind (docs/training.md).
#
# Exit code 0: OUTPUT/finished or OUTPUT/stopped says which. 2: a mistake, as the training command explained. 130: Ctrl-C.
# 1: it died RUN_FOREVER_TRIES times in a row without a newer checkpoint; between those it waits longer and longer.
set -um # m: the command gets a process group of its own, so that nothing of it outlives it

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

# shellcheck disable=SC2329 # called by the trap below
# the topmost processes below $1 that a launcher told their rank; only they know how to leave
ranks() {
    local pid
    for pid in $(pgrep -P "$1"); do
        if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -q '^RANK='; then
            echo "$pid"
        else
            ranks "$pid"
        fi
    done
}

# shellcheck disable=SC2329
forward() {
    asked=$1
    [ "$command" -ne 0 ] || return 0
    local found="" patience=30
    # a launcher takes a while to start its ranks; without one, the command is the only rank
    while [ -z "$found" ] && [ "$patience" -gt 0 ] && kill -0 "$command" 2>/dev/null; do
        found=$(ranks "$command")
        [ -n "$found" ] || sleep 1
        patience=$((patience - 1))
    done
    # shellcheck disable=SC2086 # one word a process
    kill -s "$2" ${found:-$command} 2>/dev/null
}

# `wait` returns early when a signal is forwarded
ended() {
    local code
    while true; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

trap 'forward SIGTERM TERM' TERM
trap 'forward SIGUSR1 USR1' USR1
trap 'forward SIGINT TERM' INT

failures=0
while [ -z "$asked" ]; do
    before=$(newest)
    rm -f "$output/finished" "$output/stopped"
    "$@" &
    command=$!
    ended $command
    code=$?
    kill -s KILL -- "-$command" 2>/dev/null
    command=0

    # `deepspeed` exits 0 also when its own helper was killed: the run's last word counts
    if [ $code -eq 0 ] && { [ -f "$output/finished" ] || [ -f "$output/stopped" ]; }; then
        [ "$asked" = SIGINT ] && exit 130
        exit 0
    fi
    case $code in 2 | 130) exit $code ;; esac
    if [ -n "$asked" ]; then
        echo "run_forever: it was asked to stop ($asked), but died with exit code $code; newest checkpoint: ${before:-none}" >&2
        exit 1
    fi

    if [ "$(newest)" = "$before" ]; then
        failures=$((failures + 1))
    else
        failures=0
    fi
    echo "run_forever: died with exit code $code; newest checkpoint: $(newest), ${failures} times in a row without a newer one" >&2
    if [ $failures -ge "$tries" ]; then
        echo "run_forever: giving up; starting it again would not help. Look at its last error above" >&2
        exit 1
    fi
    if [ $failures -gt 0 ]; then
        sleep $((seconds * failures)) &
        wait $! # a signal ends the wait
    fi
done
echo "run_forever: asked to stop ($asked) between two starts" >&2
[ "$asked" = SIGINT ] && exit 130
exit 0
