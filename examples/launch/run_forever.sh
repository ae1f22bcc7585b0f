#!/usr/bin/env bash
# Start a training command again until it has finished, was asked to stop, or meets something that you must mend.
#
#   examples/launch/run_forever.sh OUTPUT deepspeed --num_gpus 8 examples/pretrain_vocagno.py RUN.toml --deepspeed_config X.json
#
# OUTPUT is the run's 'output' folder. SIGTERM and SIGUSR1 go on to the ranks: they save and leave, and so does this script.
# The launcher itself must not be signalled: it would kill its ranks, or leave them behind (docs/training.md). Ranks of other
# machines are out of reach: what to type for them is in docs/clusters.md.
#
# Exit code 0: OUTPUT/finished or OUTPUT/stopped says which. 2: a mistake, as the training command explained. 130: Ctrl-C.
# 1: it died RUN_FOREVER_TRIES times in a row without a newer checkpoint; between those it waits longer and longer.
set -um # m: the command gets a process group of its own, so that Ctrl-C does not reach its ranks

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    # what stands above, without its signs
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

# a launcher may give its ranks process groups and sessions of their own, and they lose their parent when it dies; the
# environment goes wherever they go
id=$(cat /proc/sys/kernel/random/uuid)
processes() {
    grep -lszxF "RUN_FOREVER_ID=$id" /proc/[0-9]*/environ | cut -d / -f 3
}

# ranks, and a command without a launcher, once they catch SIGUSR1: whatever does not would die of it
listening() {
    local pid caught
    for pid in $(processes); do
        [ "$pid" -eq "$command" ] || grep -qsz '^RANK=' "/proc/$pid/environ" || continue
        caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null)
        [ $((16#${caught:-0} >> ($(kill -l USR1) - 1) & 1)) -eq 0 ] || echo "$pid"
    done
}

# shellcheck disable=SC2329 # called by the traps below
hand_on() {
    local found patience=10
    while [ "$command" -ne 0 ] && kill -0 "$command" 2>/dev/null; do
        found=$(listening)
        # shellcheck disable=SC2086 # one word a process
        [ -z "$found" ] || { kill -s "$1" $found 2>/dev/null && return; }
        # a launcher takes a while to start its ranks
        patience=$((patience - 1))
        if [ $patience -eq 0 ]; then
            echo "run_forever: no rank listens on this machine, so nothing has been signalled; waiting. If all ranks run on others:" \
                "ssh HOST \"pkill -USR1 -f '[p]retrain.* --local_rank=0'\"" >&2
        fi
        sleep 1
    done
}

# until they are gone: the next start must not find them with its files and GPUs
leave_nothing() {
    local left
    kill -s KILL -- "-$1" 2>/dev/null
    while left=$(processes) && [ -n "$left" ]; do
        # shellcheck disable=SC2086
        kill -s KILL $left 2>/dev/null
        sleep 0.2
    done
}

# `wait` returns early when a signal is handed on; of a command that has ended it gives the exit code, as often as asked
ended() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1"
}

trap 'asked=SIGTERM; hand_on TERM' TERM
trap 'asked=SIGUSR1; hand_on USR1' USR1
trap 'asked=SIGINT; hand_on TERM' INT

failures=0
while [ -z "$asked" ]; do
    before=$(newest)
    rm -f "$output/finished" "$output/stopped"
    RUN_FOREVER_ID=$id "$@" &
    command=$!
    [ -z "$asked" ] || hand_on TERM # the signal came before the line above
    ended $command
    code=$?
    leave_nothing $command
    command=0

    # `deepspeed` exits 0 also when its own helper was killed: the run's last word counts. 75: node.sh, for one that was stopped
    if { [ $code -eq 0 ] || [ $code -eq 75 ]; } && { [ -f "$output/finished" ] || [ -f "$output/stopped" ]; }; then
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
    [ -d "$output" ] || echo "run_forever: there is no $output: is it the run's 'output' folder?" >&2
    echo "run_forever: ended with exit code $code, unfinished; newest checkpoint: $(newest), ${failures} times in a row without a newer one" >&2
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
