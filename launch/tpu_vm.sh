#!/usr/bin/env bash
# A Cloud TPU slice through a queued resource: create, wait, run on every worker, and
# after a preemption do it again. The run goes on from its checkpoint.
#
#   PROJECT=p ZONE=us-east5-a launch/tpu_vm.sh NAME v5litepod-16 \
#       jaxalign train --gin_file=runs/dpo.gin ... --run_dir=/mnt/shared/runs/dpo
#
# All workers need one shared folder for data and runs (Filestore, NFS or a mounted
# bucket); SETUP is the place to mount it.
#
# RUNTIME (v2-alpha-tpuv5-lite) is the VM image, SPOT=1 asks for spot capacity, SETUP
# ("cd jaxalign && source .venv/bin/activate") is run on a fresh VM before the command.
# DRY_RUN=1 prints the commands.
set -euo pipefail

if (($# < 3)) || [[ -z "${PROJECT:-}" || -z "${ZONE:-}" ]]; then
    echo "usage: PROJECT=P ZONE=Z launch/tpu_vm.sh NAME TYPE jaxalign train ..." >&2
    exit 2
fi
name=$1 type=$2
shift 2
where=(--project="$PROJECT" --zone="$ZONE")
setup=${SETUP:-cd jaxalign && source .venv/bin/activate}
command="$setup && $(printf '%q ' "$@")"

create=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
    --node-id="$name" --accelerator-type="$type"
    --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}")
if [[ -n "${SPOT:-}" ]]; then
    create+=(--spot)
fi
state=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    --format="value(state.state)")
run=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all
    --command="$command")
delete=(gcloud compute tpus queued-resources delete "$name" "${where[@]}"
    --force --quiet)

if [[ -n "${DRY_RUN:-}" ]]; then
    for line in create state run delete; do
        declare -n words=$line
        printf '%q ' "${words[@]}"
        echo
    done
    exit 0
fi

while true; do
    now=$("${state[@]}" 2> /dev/null || echo ABSENT)
    case $now in
        ABSENT) "${create[@]}" ;;
        ACTIVE)
            if "${run[@]}"; then
                "${delete[@]}"
                exit 0
            fi
            # A failure of the program is the user's to see; a lost slice is not.
            if [[ $("${state[@]}" 2> /dev/null || echo ABSENT) == ACTIVE ]]; then
                echo "The command failed; $name is kept. Delete it with:" >&2
                printf '%q ' "${delete[@]}" >&2
                echo >&2
                exit 1
            fi
            ;;
        SUSPENDED | SUSPENDING | FAILED) "${delete[@]}" || true ;;
        *) sleep 30 ;;
    esac
done
