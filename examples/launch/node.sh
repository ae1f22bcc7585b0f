#!/usr/bin/env bash
# Start the ranks of one machine, without ssh. Run it once per machine, by hand or as a container's command. See docs/clusters.md
#
#   NODES=2 NODE_RANK=0 RANKS=8 MASTER_ADDR=node0 MASTER_PORT=29500 node.sh RUN.toml --deepspeed_config ds_configs/X.json
#
# SIGTERM and SIGUSR1 are forwarded to the ranks, which save and exit. Exit code 0: the run reached its last step. 75: start it
# again, because it was stopped, or failed after a new checkpoint. Any other code is that of the rank that failed first; 2 means
# that you must fix something.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    # print the comment above without its number signs
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
: "${NODES:?}" "${NODE_RANK:?}" "${RANKS:?}" "${MASTER_ADDR:?}" "${MASTER_PORT:?}"

trap 'exit 75' TERM USR1 # no rank has started yet
run=$(python -m megatron_vocagno.pretrain "$@" --print-config)
output=$(python -c 'import json, sys; print(json.load(sys.stdin)["output"])' <<< "$run")
newest_checkpoint() { cat "$output/checkpoints/latest" 2> /dev/null || true; }
before=$(newest_checkpoint)

export MASTER_ADDR MASTER_PORT WORLD_SIZE=$((NODES * RANKS)) LOCAL_SIZE=$RANKS
ranks=()
forward_signal() { kill -s "$1" "${ranks[@]}" 2> /dev/null || true; } # some may have ended
trap 'forward_signal TERM' TERM
trap 'forward_signal USR1' USR1

for ((i = 0; i < RANKS; i++)); do
    RANK=$((NODE_RANK * RANKS + i)) LOCAL_RANK=$i python -m megatron_vocagno.pretrain "$@" &
    ranks+=($!)
done

failed=0
while ((${#ranks[@]})); do
    sleep 1 &
    wait $! || true # in the background: a trap only runs after a foreground command has ended
    running=" $(jobs -rp | tr '\n' ' ') "
    for i in "${!ranks[@]}"; do
        [[ $running == *" ${ranks[i]} "* ]] && continue
        code=0
        wait "${ranks[i]}" || code=$?
        unset "ranks[i]"
        if ((code && !failed)); then
            failed=$code
            patience=$((SECONDS + 10)) # time for the others to report errors. Later they would only wait for the lost rank forever
        fi
    done
    if ((failed && SECONDS > patience)); then
        forward_signal KILL
    fi
done
if ((failed == 2 || failed == 130)) || [[ $failed != 0 && $(newest_checkpoint) == "$before" ]]; then
    exit "$failed"
elif ((failed)) || [[ ! -e $output/finished ]]; then
    exit 75
fi
