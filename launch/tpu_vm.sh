#!/usr/bin/env bash
# A Cloud TPU slice as a queued resource, and t5g2 on all its hosts; made by launch/launch.py tpu-vm.
# Asks again for a slice that was preempted, and goes on there. Run it where it can stay: tmux on a
# small machine. Run it again after an interruption: it takes up what it finds.
set -uo pipefail
name=@{name}
place=(@{place})

# What became of the request; nothing if there is none.
state() {
  gcloud compute tpus queued-resources list "${place[@]}" --filter="name~/$name\$" \
    --format='value(state.state)'
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

while true; do
  if ! now=$(state); then
    sleep @{poll_seconds}
    continue
  fi
  case "$now" in
    "")
      gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type=@{accelerator_type} --runtime-version=@{runtime_version}@{create_options} || exit 1
      ;;
    ACTIVE)
      echo "$name: preparing its hosts"
      if on_all_hosts @{prepare}; then
        echo "$name: training"
        on_all_hosts @{train}
        status=$?
        if [[ $status -eq 0 ]]; then
          echo "$name: done. It costs until it is deleted:"
          echo "  gcloud compute tpus queued-resources delete $name ${place[*]} --force"
          exit 0
        fi
      else
        status=1
      fi
      sleep @{poll_seconds} # a preemption takes a moment to show
      if [[ $(state) == ACTIVE ]]; then
        echo "$name: not preempted, but t5g2 ended with $status (see above): run this again to go on"
        exit "$status"
      fi
      ;;
    FAILED)
      echo "$name: Cloud TPU could not give it: see gcloud compute tpus queued-resources describe $name"
      exit 1
      ;;
    SUSPENDED)
      echo "$name: preempted; asking for another"
      gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet || exit 1
      ;;
    *)
      echo "$name: $now"
      sleep @{poll_seconds}
      ;;
  esac
done
