#!/bin/bash
# The first process of one practice node, alone in its own process, mount and host name namespaces:
# when it ends, everything that ever ran on the node ends with it.
#   node.sh NAME HOSTS_FILE
set -euo pipefail
hostname "$1"
mount --bind "$2" /etc/hosts
slurmd -N "$1"
while :; do # bash collects the orphans of the node while it waits
  sleep 3600 &
  wait
done
