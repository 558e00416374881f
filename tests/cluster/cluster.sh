#!/usr/bin/env bash
# A real Slurm cluster on one machine: each node has a network, a hostname, an /etc/hosts and processes of its own.
#   cluster.sh up | down | exec COMMAND... | kill NODE | start NODE
# Needs root, slurm-wlm, munge and iproute2. All its files are in $CLUSTER_DIR, and its namespaces are named after it.
set -euo pipefail
DIR=${CLUSTER_DIR:?a folder for its state, one a cluster}
NUM_NODES=${CLUSTER_NODES:-2}
NET=10.77.0 # exists inside the namespaces alone
PREFIX=sd$(printf %s "$DIR" | cksum | cut -d' ' -f1)
export SLURM_CONF=$DIR/slurm.conf

# A process counts as ours while its command line names DIR: ids are reused, and zombies remain for a while.
alive() { [ -s "$1" ] && grep -qaF "$DIR" "/proc/$(<"$1")/cmdline" 2>/dev/null; }
stop() { # stop PIDFILE: end that process and wait for it
  if alive "$1"; then
    kill -KILL "$(<"$1")" || :
    while alive "$1"; do sleep .05; done
  fi
  rm -f "$1"
}
inside() { # inside HOST COMMAND...: with its network and hostname
  local host=$1
  shift
  exec ip netns exec "$PREFIX-$host" unshare --uts --mount bash -c \
    'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' inside "$host" "$DIR/hosts" "$@"
}
daemon() { # daemon NAME HOST COMMAND...: in the background, until stopped
  local name=$1
  shift
  (inside "$@") >>"$DIR/$name.out" 2>&1 </dev/null &
  echo $! >"$DIR/pid/$name"
}
start_node() { # The first of its processes is a bash: killing it kills the whole node, as a power cut does.
  daemon "$1" "$1" setsid unshare --pid --fork --kill-child=KILL --mount-proc bash -c \
    'slurmd -D -f "$1" -N "$2" & sleep infinity & wait' node "$SLURM_CONF" "$1"
}
configure() {
  cat <<END
ClusterName=tests
SlurmctldHost=control($NET.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,sched_min_interval=100000,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=5
MinJobAge=3600
END
  for i in $(seq "$NUM_NODES"); do
    echo "NodeName=node$i NodeAddr=$NET.$((10 + i)) CPUs=64 RealMemory=500000 State=UNKNOWN"
  done
  echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
}
wire() { # wire HOST ADDRESS: a cable from the host to the switch in control's network
  ip netns add "$PREFIX-$1"
  ip -n "$PREFIX-$1" link set lo up
  ip -n "$PREFIX-control" link add "to-$1" type veth peer name eth0 netns "$PREFIX-$1"
  ip -n "$PREFIX-control" link set "to-$1" master switch up
  ip -n "$PREFIX-$1" addr add "$2/24" dev eth0
  ip -n "$PREFIX-$1" link set eth0 up
}

case ${1:-} in
up)
  mkdir -p "$DIR"/{state,pid,munge}
  chmod 755 "$DIR" "$DIR/munge"
  (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
  { echo "127.0.0.1 localhost"; echo "$NET.1 control"; } >"$DIR/hosts"
  for i in $(seq "$NUM_NODES"); do echo "$NET.$((10 + i)) node$i" >>"$DIR/hosts"; done
  configure >"$SLURM_CONF"
  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf" # named, not used: slurmd would look for one and not start
  ip netns add "$PREFIX-control"
  ip -n "$PREFIX-control" link set lo up
  ip -n "$PREFIX-control" link add switch type bridge
  ip -n "$PREFIX-control" addr add "$NET.1/24" dev switch
  ip -n "$PREFIX-control" link set switch up
  for i in $(seq "$NUM_NODES"); do wire "node$i" "$NET.$((10 + i))"; done
  M=$DIR/munge
  daemon munged control setsid munged -F -f --key-file="$M/key" --socket="$M/socket" --pid-file="$M/pid" \
    --log-file="$M/log" --seed-file="$M/seed"
  for _ in $(seq 100); do [ -S "$M/socket" ] && break; sleep .05; done
  daemon slurmctld control setsid slurmctld -D -f "$SLURM_CONF"
  for i in $(seq "$NUM_NODES"); do start_node "node$i"; done
  for _ in $(seq 200); do
    [ "$("$0" exec sinfo -h -t idle -o %D 2>/dev/null || :)" = "$NUM_NODES" ] && exit 0
    sleep .1
  done
  echo "the cluster did not come up; $DIR/*.out say why" >&2
  exit 1
  ;;
down)
  for pid in "$DIR"/pid/*; do stop "$pid"; done
  for host in $(ip netns list | cut -d' ' -f1 | grep "^$PREFIX-" || :); do ip netns del "$host"; done
  ;;
exec) shift && inside control "$@" ;;
kill) stop "$DIR/pid/$2" ;; # a power cut
start) start_node "$2" ;;
*) sed -n 2,4p "$0"; exit 2 ;;
esac
