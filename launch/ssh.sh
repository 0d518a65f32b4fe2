#!/usr/bin/env bash
# The same command on several machines over ssh, one process each; the first is the
# coordinator. Every machine needs the code, its environment and a shared run directory.
#
#   launch/ssh.sh host0,host1,host2 jaxalign train --gin_file=runs/dpo.gin ... \
#       --run_dir=/shared/runs/dpo
#
# PORT (8482) is the coordinator's, SETUP a command before it, such as
# "cd jaxalign && source .venv/bin/activate". DRY_RUN=1 prints the commands. When one
# process fails, the others are ended. SIGINT and SIGTERM are passed on to all.
set -euo pipefail

if (($# < 2)); then
    echo "usage: launch/ssh.sh HOST,HOST,... jaxalign train ..." >&2
    exit 2
fi
IFS=, read -r -a hosts <<< "$1"
shift
command=$(printf '%q ' "$@")
coordinator="${hosts[0]##*@}:${PORT:-8482}"

commands=()
for i in "${!hosts[@]}"; do
    commands+=("${SETUP:+$SETUP && }exec ${command}--coordinator_address=$coordinator --process_count=${#hosts[@]} --process_index=$i")
done

if [[ -n "${DRY_RUN:-}" ]]; then
    for i in "${!hosts[@]}"; do
        printf '%q ' ssh -tt "${hosts[$i]}" "${commands[$i]}"
        echo
    done
    exit 0
fi

processes=()
end_all() {
    for process in "${processes[@]}"; do
        kill -TERM "$process" 2> /dev/null || true
    done
}
trap end_all INT TERM

for i in "${!hosts[@]}"; do
    # A terminal on the other side (-tt): it ends when the connection does.
    ssh -tt "${hosts[$i]}" "${commands[$i]}" < /dev/null \
        > >(sed -u "s/^/[$i] /") 2>&1 &
    processes+=("$!")
done

status=0
for _ in "${processes[@]}"; do
    wait -n || {
        status=$?
        end_all
    }
done
exit "$status"
