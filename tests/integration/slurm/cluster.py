"""A real Slurm on this machine, for tests: slurmctld, munge, and one slurmd per virtual node.

Every virtual node has its own host name, /etc/hosts and processes (UTS, mount and PID namespaces). Its GPUs are only
character devices. The cluster changes nothing outside `root`, a temporary folder, except the mode of the folders above
it. Needs root and Debian's slurmctld, slurmd and munge.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import reserved_block
from tests.processes import DEADLINE_SECONDS

_DAEMONS = ("slurmctld", "slurmd", "munged", "unshare", "nsenter")
_GPUS, _CPUS = 8, 96
# Virtual clusters on one machine, and ids that the jobs of each may have: as many as have different ports in job.sh.
_CLUSTERS, _JOBS = 12, 140
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0,requeue_delay=1,sched_max_job_start=0
MinJobAge=3600
KillWait=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=300
InactiveLimit=0
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname=n[1-{nodes}] NodeAddr=127.0.0.1 Port={first}-{last} CPUs={cpus} Sockets=1 \
CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=262144 Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO State=UP
"""


def why_not() -> str | None:
    """Return why this machine cannot run the virtual cluster, or None."""
    missing = [name for name in _DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing:
        return f"no {', '.join(missing)}: `make slurm` installs Debian's Slurm, as root"
    if os.geteuid():
        return "virtual Slurm nodes need root (host names and /etc/hosts of their own)"
    return None


def polls(seconds: float, period: float = 0.1) -> Iterator[None]:
    """Yield as often as a period fits into some seconds, and sleep for a period after each time.

    It counts and does not look at the clock: on a busy machine what the caller does in between takes longer, as does
    the work that it waits for. So other work on the machine postpones the deadline, and a job that hangs does not.
    """
    for _ in range(math.ceil(seconds / period)):
        yield
        time.sleep(period)


@dataclass
class Cluster:
    """A running virtual cluster of nodes n1, n2, ..."""

    root: Path
    size: int
    environment: dict[str, str] = field(default_factory=dict)
    inits: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By node, the process whose only child is the first process of the node."""

    def run(self, *command: object, check: bool = True) -> str:
        """Run a command against this cluster and return its output, both streams."""
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        assert not check or done.returncode == 0, f"{command} ended with status {done.returncode}: {done.stdout}"
        return done.stdout

    def submit(self, script: Path, *arguments: object, options: Sequence[str] = (), **variables: str) -> str:
        """Submit a script of the project and return the id of the job."""
        environment = os.environ | self.environment | variables
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.root}/out-%j.txt", *options, str(script), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            cwd=script.parents[2],
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, job: str) -> str:
        path = self.root / f"out-{job}.txt"
        return path.read_text(errors="replace") if path.is_file() else ""

    def job(self, job: str) -> dict[str, str]:
        """Return the fields that scontrol shows for a job."""
        for _ in polls(300, 1.0):  # as job scripts do: on a busy machine scontrol may get no answer
            text = self.run("scontrol", "show", "job", "-o", job, check=False)
            if text.startswith("JobId="):
                return dict(word.split("=", 1) for word in text.split() if "=" in word)
        raise AssertionError(f"scontrol does not show job {job}: {text}")

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of the states, and return its fields."""
        for _ in polls(DEADLINE_SECONDS, 0.5):
            if (fields := self.job(job))["JobState"] in states:
                return fields
        raise TimeoutError(f"job {job} is {fields['JobState']}, not {states}:\n{self.output(job)[-6000:]}")

    def finished(self, job: str) -> dict[str, str]:
        """Wait until a job has ended and will not be requeued."""
        return self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_for_output(self, job: str, pattern: str, count: int = 1) -> None:
        """Wait until the job's output has `count` matches of a regular expression."""
        for poll, _ in enumerate(polls(DEADLINE_SECONDS, 0.05)):
            if poll % 20 == 0:  # asking Slurm takes far longer than reading a file
                state = self.job(job)["JobState"]
            if len(re.findall(pattern, self.output(job))) >= count:
                return
            if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
                break
        raise TimeoutError(f"no {count} x {pattern!r} of job {job}, {state}:\n{self.output(job)[-6000:]}")

    def processes(self, job: str, pattern: str = "", node: str = "") -> list[int]:
        """Return the living processes of a job, on one node or all, whose command line matches a regular expression."""
        wanted = {f"SLURM_JOB_ID={job}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        if node:
            wanted.add(f"SLURMD_NODENAME={node}")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                variables = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                # slurmstepd has the environment of its job, and ends with it.
                if wanted <= variables and re.search(pattern, command) and "slurmstepd" not in command:
                    found.append(int(entry.name))
        return found

    def orphans(self, job: str, timeout: float = 300) -> list[str]:
        """Wait until no process of a job is left. Return those that remain at the deadline, as ps shows them."""
        for _ in polls(timeout):
            if not (found := self.processes(job)):
                return []
        return [self.run("ps", "-o", "pid,ppid,args", "-p", pid, check=False) for pid in found]

    def on_node(self, node: str, *command: object) -> str:
        """Run a command in a node's namespaces."""
        return self.run("nsenter", "-t", self.inits[node].pid, "--mount", "--uts", *command)

    def power_off(self, node: str) -> None:
        """End all processes of a node at once, as a power cut does, and mark the node as down."""
        self.end_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def end_node(self, node: str) -> None:
        """Kill the first process of a node, and wait until no process of the node is left."""
        # The kernel kills a PID namespace with its first process, before any other process of it can notice a death.
        # Killed one by one, slurmstepd would report the end of what it watches, and a rank that of its peer.
        unshare = self.inits.pop(node)
        (init,) = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        os.kill(int(init), signal.SIGKILL)
        unshare.wait(600)  # it ends when no process of the namespace is left

    def start_node(self, node: str) -> None:
        """Start the first process of a node, which starts slurmd, ends with it, and reaps orphans."""
        (self.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        script = f"hostname {node}; mount --bind {self.root}/hosts /etc/hosts; slurmd -D -N {node} & wait $!"
        namespaces = ["--mount", "--uts", "--pid", "--mount-proc", "--propagation", "private"]
        self.inits[node] = subprocess.Popen(
            ["unshare", *namespaces, "--fork", "--kill-child", "bash", "-c", script],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def restore(self) -> None:
        """Cancel all jobs, start the nodes that were powered off, and wait until every node is idle."""
        self.run("scancel", "--state=PENDING", "--state=RUNNING", "--user=root", check=False)
        for node in [f"n{i}" for i in range(1, self.size + 1)]:
            if node not in self.inits:
                self.start_node(node)
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until every node is idle."""
        for _ in polls(DEADLINE_SECONDS, 0.5):
            if (states := self.run("sinfo", "-h", "-N", "-o", "%T").split()).count("idle") == self.size:
                return
        raise TimeoutError(f"nodes are {states}; {self.run('sinfo', '-R')}")


@contextlib.contextmanager
def virtual_cluster(root: Path, size: int) -> Iterator[Cluster]:
    """Start a cluster of `size` nodes under `root`; at the end, stop it and all its jobs."""
    # All nodes of all virtual clusters of a machine have the address 127.0.0.1, and jobs compute the ports of their own
    # processes from their ids. With the same ids, the jobs of two clusters would meet at the same port.
    starts = range(12000, 12000 + 500 * _CLUSTERS, 500)
    with reserved_block([range(start, start + size + 1) for start in starts]) as ports:
        first_job = 1 + _JOBS * starts.index(ports.start)
        with _running_cluster(root, size, ports.start, first_job) as cluster:
            yield cluster


@contextlib.contextmanager
def _running_cluster(root: Path, size: int, port: int, job: int) -> Iterator[Cluster]:
    """Start a cluster at these ports, whose first job has the id `job`."""
    for name in ("state", "log", "spool", "run", "dev", "munge"):
        (root / name).mkdir(parents=True)
    # munge refuses a socket in folders that others cannot enter, and the folders of a test have mode 700.
    for folder in (root / "munge", root, *root.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    settings = {"root": root, "host": host, "port": port, "first": port + 1, "last": port + size, "job": job}
    settings |= {"nodes": size, "cpus": _CPUS, "gpus": _GPUS}
    (root / "slurm.conf").write_text(_CONFIGURATION.format(**settings))
    devices = f"File={root}/dev/gpu[0-{_GPUS - 1}]"
    (root / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{size}] Name=gpu Type=h100 {devices}\n")
    for gpu in range(_GPUS):  # with plain files, the tasks would have an empty CUDA_VISIBLE_DEVICES
        os.mknod(root / "dev" / f"gpu{gpu}", 0o020666, os.makedev(1, 3))
    names = "".join(f"127.0.0.1 n{i}\n" for i in range(1, size + 1))
    (root / "hosts").write_text(Path("/etc/hosts").read_text() + names)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    cluster = Cluster(root, size, {"SLURM_CONF": str(root / "slurm.conf"), "PATH": path})
    munge = root / "munge"
    (munge / "key").touch(0o600)
    (munge / "key").write_bytes(os.urandom(128))
    files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
    try:
        cluster.run("munged", f"--socket={munge}/socket", *files, "--num-threads=2")
        cluster.run("slurmctld", "-c")
        for i in range(1, size + 1):
            cluster.start_node(f"n{i}")
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.run("scancel", "--state=PENDING", "--state=RUNNING", "--user=root", check=False)
        for _ in polls(300):
            if not cluster.run("squeue", "-h", check=False).strip():
                break
        daemons = [int(file.read_text()) for file in (root / "run" / "slurmctld.pid", munge / "pid") if file.is_file()]
        for node in list(cluster.inits):
            cluster.end_node(node)
        for pid in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for _ in polls(300):
            if not any(Path(f"/proc/{pid}").exists() for pid in daemons):
                break
