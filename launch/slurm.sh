#!/usr/bin/env bash
# A Slurm job, one task for each GPU; made by launch/launch.py slurm. sbatch takes it.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --gpus-per-node=@{gpus_per_node}
#SBATCH --ntasks-per-node=@{gpus_per_node}
#SBATCH --time=@{time}
#SBATCH --output=@{log}
#SBATCH --open-mode=append
#SBATCH --requeue
# Ten minutes before the time is up, this script (B) hears of it.
#SBATCH --signal=B:USR1@600
@{more_options}
set -uo pipefail
cd @{directory} || exit 2

srun @{srun_options}@{command} &
step=$!
# The tasks finish their step, save, and exit with 143.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Slurm's own TERM goes to the tasks, too: a second one would not let them save.
trap ':' TERM

while kill -0 "$step" 2>/dev/null; do wait "$step"; done # each trap ends a wait
wait "$step"
status=$?

# Stopped and saved (143) or hung (75), while nobody has cancelled the job: the same job goes on from
# there. What hangs each time is not begun for ever.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
again=$((status == 143 || (status == 75 && ${SLURM_RESTART_COUNT:-0} < 20)))
if [[ $again -eq 1 && $state == RUNNING ]]; then
  echo "t5g2 ended with $status: requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
