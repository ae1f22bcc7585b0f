#!/usr/bin/env bash
# The ranks of one machine, started by hand or as a container's command: one call a machine, no ssh. docs/clusters.md
#
#   NODES=2 NODE_RANK=0 RANKS=8 MASTER_ADDR=node0 MASTER_PORT=29500 node.sh RUN.toml --deepspeed_config ds_configs/X.json
#
# SIGTERM and SIGUSR1 are handed on to the ranks, which save and leave. Exit code 0: the run reached its last step. 75: start it
# again, for it was asked to stop, or died after a new checkpoint. Else that of the rank that failed first; 2 means that there is
# something to mend.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    # what stands above, without its signs
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
: "${NODES:?}" "${NODE_RANK:?}" "${RANKS:?}" "${MASTER_ADDR:?}" "${MASTER_PORT:?}"

trap 'exit 75' TERM USR1 # nothing has begun
run=$(python -m megatron_vocagno.pretrain "$@" --print-config)
output=$(python -c 'import json, sys; print(json.load(sys.stdin)["output"])' <<< "$run")
newest_checkpoint() { cat "$output/checkpoints/latest" 2> /dev/null || true; }
before=$(newest_checkpoint)

export MASTER_ADDR MASTER_PORT WORLD_SIZE=$((NODES * RANKS)) LOCAL_SIZE=$RANKS
ranks=()
hand_on() { kill -s "$1" "${ranks[@]}" 2> /dev/null || true; } # some may have ended
trap 'hand_on TERM' TERM
trap 'hand_on USR1' USR1

for ((i = 0; i < RANKS; i++)); do
    RANK=$((NODE_RANK * RANKS + i)) LOCAL_RANK=$i python -m megatron_vocagno.pretrain "$@" &
    ranks+=($!)
done

failed=0
while ((${#ranks[@]})); do
    sleep 1 &
    wait $! || true # not in the foreground: a signal would have to wait for it
    running=" $(jobs -rp | tr '\n' ' ') "
    for i in "${!ranks[@]}"; do
        [[ $running == *" ${ranks[i]} "* ]] && continue
        code=0
        wait "${ranks[i]}" || code=$?
        unset "ranks[i]"
        if ((code && !failed)); then
            failed=$code
            patience=$((SECONDS + 10)) # for the others to say what is wrong; then they would wait for the lost one for ever
        fi
    done
    if ((failed && SECONDS > patience)); then
        hand_on KILL
    fi
done
if ((failed == 2 || failed == 130)) || [[ $failed != 0 && $(newest_checkpoint) == "$before" ]]; then
    exit "$failed"
elif ((failed)) || [[ ! -e $output/finished ]]; then
    exit 75
fi
