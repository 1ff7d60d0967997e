#!/usr/bin/env bash
# Several processes on this machine, over loopback; made by launch/launch.py local.
set -uom pipefail # m: Ctrl-C reaches this script alone, which passes it on once

processes=()
for ((index = 0; index < @{processes}; index++)); do
  @{command} \
    --gin.hosts.coordinator=localhost:@{port} \
    --gin.hosts.count=@{processes} \
    --gin.hosts.index="$index" &
  processes+=("$!")
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' INT TERM

status=0
for process in "${processes[@]}"; do
  while kill -0 "$process" 2>/dev/null; do wait "$process"; done # a trap ends a wait
  wait "$process"
  code=$?
  if [[ $status -eq 0 ]]; then status=$code; fi
done
exit "$status"
