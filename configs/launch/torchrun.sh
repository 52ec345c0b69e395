#!/bin/bash
# Trains on several nodes and starts all ranks again when one dies. The same command on every node:
#
#   NODES=4 HEAD=node-1:29400 configs/launch/torchrun.sh -c configs/alfworld.yaml -c configs/strategy/zero3.yaml \
#     -c configs/launch/checkpoint.yaml --run.directory runs/mine
#
# NODES      number of nodes, or MIN:MAX where it may change (DDP; under ZeRO the number of ranks must stay)
# HEAD       one of the nodes and a free port: where they meet. It must live as long as the run
# PROCESSES  ranks a node; by default as many as it has GPUs
# RESTARTS   how often a node may start its ranks again
# GRACE      seconds that ranks have after SIGTERM to finish the iteration and save
# ADDRESS    of this node, where the others cannot resolve its host name
# RUN_ID     tells runs apart that share a HEAD
set -eu

# torch's agents would let restarted ranks read the addresses of the dead ones from a store that both use (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-900}

head=${HEAD:-localhost:29400}
options=()
if [[ -n ${ADDRESS:-} ]]; then
  host=0
  [[ ${head%:*} != "$ADDRESS" ]] || host=1
  options=(--local-addr "$ADDRESS" --rdzv-conf "is_host=$host")
fi

# How many ranks there are is known once the nodes have met: each rank reads it from its environment.
# shellcheck disable=SC2016
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-10}" \
  --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "${RUN_ID:-spear}" "${options[@]}" --no-python \
  bash -c 'exec spear fit "$@" --trainer.num_nodes "$GROUP_WORLD_SIZE" --trainer.devices "$LOCAL_WORLD_SIZE" \
    --ckpt_path last' spear "$@"
