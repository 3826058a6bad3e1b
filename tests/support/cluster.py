"""A real SLURM in a folder: every node is a network, host, process and mount namespace with fake GPUs.

Each node has an address and a host name of its own, so that an address that is right on one node alone fails here as
it would on a cluster; killing a node ends everything on it at once and tells nobody.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil

from support.patience import PATIENCE, wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_PORT, _NODE_PORT = 17100, 17000

# bash is the first process of the node: it takes up orphans, and with it the whole node ends.
_NODE = """
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/etc/hosts" /etc/hosts
mount --bind "$2/etc/slurmd.conf" "$2/etc/slurm.conf"
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$3/24" dev eth0
ip link set eth0 up
slurmd -D -N "$1" & wait
"""

_CONF = """
ClusterName=test
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# To the controller it is how long a requeued job waits; less than five seconds count as nothing. To a node it is how
# old the credential of a step may be: on a busy machine those few seconds pass before it starts, and a start is lost.
AuthInfo=socket={folder}/run/munge.socket,cred_expire={cred_expire}
DebugFlags=NO_CONF_HASH
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/run/slurmctld.own.pid
SlurmdPidFile={folder}/run/slurmd.%n.own.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=10
KillWait=30
UnkillableStepTimeout=15
InactiveLimit=0
MinJobAge=3600
MessageTimeout=20
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 State=UP PriorityTier=1 GraceTime=600
PartitionName=hasty Nodes=ALL Default=NO MaxTime=60 DefaultTime=10 State=UP PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes=ALL Default=NO MaxTime=60 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""


def unavailable() -> str | None:
    """Return why the cluster cannot run here, None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client munge iproute2"
    if os.geteuid() != 0:
        return "namespaces for the nodes need root"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def free_subnet(first: int) -> int:
    """A number from `first` on that no cluster has, nor the bridge of one that was killed with its process."""
    numbers = [(first + offset) % 250 for offset in range(250)]
    return next(number for number in numbers if not Path(f"/sys/class/net/slurm{number}").exists())


class Cluster:
    """A context in which SLURM runs; nothing of it is left behind.

    Args:
        folder: of configuration, logs and state; new or empty.
        nodes: number of nodes, n0, n1 ...
        gpus: per node; fake ones, or else this machine's dealt out to the nodes.
        are_real: the GPUs are this machine's. Nodes beyond their number get those of n2 again, which tests kill.
    """

    def __init__(self, folder: Path, nodes: int, gpus: int, are_real: bool = False) -> None:
        self.folder, self.nodes, self._gpus, self._are_real = folder, nodes, gpus, are_real
        self._subnet = free_subnet(os.getpid() % 250)  # several clusters may run at once, one per process
        self._net, self._bridge = f"10.77.{self._subnet}", f"slurm{self._subnet}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "PATH": _PATH}

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start("munged", *self._munge())
            wait_until((self.folder / "run" / "munge.socket").exists, "munged")
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in range(self.nodes):
                self.start_node(node)
            wait_until(lambda: self.states() == {f"n{node}": "idle" for node in range(self.nodes)}, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [f"n{node}" for node in range(self.nodes)] + ["slurmctld", "munged"]:
            self._kill(name)
        subprocess.run(["ip", "link", "del", self._bridge], env=self._variables(), capture_output=True, check=False)

    def run(self, *words: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would, with its output as text."""
        done = subprocess.run(
            words, env=self._variables() | variables, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def states(self) -> dict[str, str]:
        """The state of every node as `sinfo` shows it."""
        lines = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t", check=False).stdout.splitlines()
        return dict(line.split() for line in lines)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ExitCode ..."""
        words = self.run("scontrol", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what SLURM says of it."""
        return wait_until(
            lambda: (said := self.job(job))["JobState"] in states and said, lambda: f"{states}: {self.job(job)}"
        )

    def start_node(self, node: int) -> None:
        name, address = f"n{node}", f"{self._net}.{10 + node}"
        for kind in ("spool", "tmp"):
            (self.folder / kind / name).mkdir(parents=True, exist_ok=True)
        namespaces = ("--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
        outer = self._start(name, "unshare", *namespaces, "bash", "-c", _NODE, "_", name, str(self.folder), address)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        inner = wait_until(lambda: children.read_text().split(), f"the first process of {name}")[0]
        link = f"s{self._subnet}n{node}"
        # The kernel takes its time to do away with the network of a node that was killed.
        subprocess.run(["ip", "link", "del", link], env=self._variables(), capture_output=True, check=False)
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", inner)
        self._ip("link", "set", link, "master", self._bridge, "up")

    def kill_node(self, node: int) -> None:
        """End everything on a node at once, as a power cut does."""
        self._kill(f"n{node}")

    def signal_rank(self, rank: int, job: str, number: signal.Signals) -> None:
        """Send a signal to one rank of a training, and to the helpers that it has forked."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ()
                # Another cluster at the same time has a job of this number, too.
                is_here = mine.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                is_rank = (mine.get("RANK"), mine.get("SLURM_JOB_ID")) == (str(rank), job)
                if is_here and is_rank and "train" in process.cmdline():
                    process.send_signal(number)

    def _configure(self) -> None:
        for name in ("etc", "run", "log", "spool", "state", "tmp", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        etc, host = self.folder / "etc", socket.gethostname().split(".")[0]
        (etc / "munge.key").write_bytes(os.urandom(128))
        (etc / "munge.key").chmod(0o600)
        for gpu in range(self._gpus):
            (self.folder / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
        gpus = [
            f"NodeName=n{node} Name=gpu File={self._gpu_files(node)} Flags=nvidia_gpu_env" for node in range(self.nodes)
        ]
        (etc / "gres.conf").write_text("\n".join([*gpus, ""]))
        (etc / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        nodes = [
            f"NodeName=n{node} NodeAddr={self._net}.{10 + node} Port={_NODE_PORT} CPUs=16 RealMemory=64000 "
            f"Gres=gpu:{self._gpus} State=UNKNOWN"
            for node in range(self.nodes)
        ]
        facts = {"host": host, "net": self._net, "port": _PORT + self._subnet, "folder": self.folder}
        for name, cred_expire in (("slurm.conf", 8), ("slurmd.conf", 120)):
            (etc / name).write_text(_CONF.format(**facts, nodes="\n".join(nodes), cred_expire=cred_expire))
        hosts = [f"{self._net}.{10 + node} n{node}" for node in range(self.nodes)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{self._net}.1 {host}", *hosts, ""]))
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"{self._net}.1/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")

    def _gpu_files(self, node: int) -> str:
        if not self._are_real:
            return f"{self.folder}/dev/nvidia[0-{self._gpus - 1}]"
        there = len(list(Path("/dev").glob("nvidia[0-9]*")))
        first = (node if (node + 1) * self._gpus <= there else 2) * self._gpus
        return f"/dev/nvidia[{first}-{first + self._gpus - 1}]"

    def _munge(self) -> list[str]:
        run, log = self.folder / "run", self.folder / "log"
        files = {"socket": run / "munge.socket", "pid-file": run / "munged.own.pid", "log-file": log / "munged.log"}
        files |= {"seed-file": run / "munge.seed", "key-file": self.folder / "etc" / "munge.key"}
        return ["munged", "-F", "--force", *(f"--{option}={file}" for option, file in files.items())]

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{name}.out", "a") as log:
            daemon = subprocess.Popen(words, env=self._variables(), stdout=log, stderr=log, start_new_session=True)
        self._daemons[name] = daemon
        return daemon

    def _kill(self, name: str) -> None:
        if daemon := self._daemons.pop(name, None):
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], env=self._variables(), check=True, capture_output=True)

    def _variables(self) -> dict[str, str]:
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        inherited = {key: value for key, value in os.environ.items() if key not in launcher}
        return inherited | self.environment
