"""A site file for the production scripts that makes their model tiny; how they are run with it."""

import json
import os
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from support import fork_server
from support.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
_SITE = """
export SBATCH_ACCOUNT= SBATCH_PARTITION={partition}
export PYTHONPATH={repository} OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
RUNS={folder}/runs
PYTHON={python}
SITE_OVERRIDES=({overrides})
"""


@dataclass
class Site:
    """A folder with a site file.

    Attributes:
        folder: of it and of everything that jobs write.
        data: overrides that name the data.
        overrides: all that the site file has.
    """

    folder: Path
    data: list[str]
    overrides: list[str] = field(default_factory=list)

    def write(self, *overrides: str, partition: str = "batch", full_size: bool = False, more: str = "") -> None:
        """Write the site file anew."""
        self.overrides = [*([] if full_size else TINY), *self.data, *overrides]
        places = {"repository": REPOSITORY, "folder": self.folder, "python": fork_server.python()}
        text = _SITE.format(overrides=shlex.join(self.overrides), partition=partition, **places)
        (self.folder / "site.sh").write_text(text + more)

    @property
    def variables(self) -> dict[str, str]:
        return {"SITE": str(self.folder / "site.sh")}

    def run_dir(self, name: str = "moe7b") -> Path:
        return self.folder / "runs" / name

    def words(self, script: str, *words: str) -> list[str]:
        """The command line of a script, perhaps with a variant behind its name, with its log in this folder."""
        name, *variant = script.split()
        return [str(REPOSITORY / "launch" / name), *variant, f"--output={self.folder}/logs/%x-%j.log", *words]

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in (self.folder / "logs").glob(f"*-{job}.log"))


# What makes a model of configs/ one for two cores. Megatron resumes its distributed optimizer with TE or Apex only, and
# each rank's writer of asynchronous checkpoints takes seconds to start: see ASYNCHRONOUS.
TINY = [
    "num_layers=2",
    "hidden_size=32",
    "num_attention_heads=2",
    "ffn_hidden_size=32",
    "seq_length=32",
    "max_position_embeddings=32",
    "num_experts=4",
    "moe_router_topk=2",
    "moe_ffn_hidden_size=32",
    "moe_grouped_gemm=false",
    "vocab_size=null",
    "expert_model_parallel_size=1",
    "distributed_backend=gloo",
    "use_distributed_optimizer=false",
    "overlap_grad_reduce=false",
    "overlap_param_gather=false",
    "async_save=false",
    "use_persistent_ckpt_worker=false",
    "num_workers=0",
    "micro_batch_size=1",
    "global_batch_size=4",
    "eval_iters=1",
    "log_interval=1",
    "tensorboard_log_interval=1",
    "log_throughput=false",
]

# As in the configs: checkpoints are written while training goes on.
ASYNCHRONOUS = ("async_save=true", "use_persistent_ckpt_worker=true")


def samples(count: int) -> list[str]:
    """Overrides for a run of so many samples; the schedule is that of one with 240."""
    return [f"train_samples={count}", "lr_decay_samples=240", "lr_warmup_samples=16"]


def make_site(folder: Path, config: Path) -> Site:
    """Return a site whose data are those of the tiny `config`."""
    data = yaml.safe_load(config.read_text())["data"]
    site = Site(folder, [f"{name}={json.dumps(value)}" for name, value in data.items()])
    site.write()
    return site


def submit_to_two_nodes(cluster: Cluster, site: Site, script: str, *words: str) -> str:
    """Submit a script for two tasks on each of two nodes; returns the job's number."""
    nodes = ("-N", "2", "--ntasks-per-node", "2", "--gpus-per-node=2", "-c1", "-t", "60")
    done = cluster.run(*site.words(script, *nodes, *words), **site.variables, CHECK="no")
    return done.stdout.split()[-1]


def run_on_login_node(site: Site, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script where no SLURM is installed."""
    variables = os.environ | site.variables
    return subprocess.run(site.words(script, *words), env=variables, capture_output=True, text=True, check=False)
