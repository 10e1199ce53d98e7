# Settings of launch/tpu_vm/*.sh, in bash: cp launch/tpu_vm/settings.example.sh launch/tpu_vm/settings.sh, then edit.
# shellcheck shell=bash disable=SC2034

NAME=if-base          # of the TPU slice and of its place in the queue
TYPE=v6e-16           # the line to change for more chips: v5litepod-8, v6e-256, v5p-128, v4-128, …
ZONE=us-east5-b       # one that has TYPE: gcloud compute tpus accelerator-types list --zone ZONE
PROJECT=''            # '' is that of gcloud's configuration
TIER=spot             # spot (cheap, taken away at any time: use watch.sh), on-demand or reserved
TRAIN=(--config configs/demo_base.py --workdir gs://BUCKET/runs/base)  # what `if-jax train` gets

# All of these may stay.
EMBED=()              # what `if-jax embed` gets from run.sh --embed: (--config … --out gs://BUCKET/states)
RUNTIME=''            # image of the VMs; '' is the usual one of TYPE
REPO=''               # where the workers clone from; '' is origin of this checkout, as https
REV=''                # the commit they check out; '' is HEAD of this checkout
CREATE_FLAGS=()       # more for `gcloud compute tpus queued-resources create`, such as --valid-until-duration=6h
SSH_FLAGS=()          # more for `gcloud compute tpus tpu-vm ssh`, such as --internal-ip
PRICE=''              # what you pay for one chip for an hour: status.sh multiplies
POLL_SECONDS=30       # between two looks at the slice
