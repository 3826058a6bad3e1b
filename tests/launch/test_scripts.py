"""What the launch scripts say before anything is submitted; no SLURM is needed for it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.site_files import REPOSITORY, Site, run_on_login_node

SCRIPTS = sorted((REPOSITORY / "launch").glob("*.sh"))


@pytest.fixture(autouse=True)
def login_node(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without sbatch, and without the check of config and data, which has tests of its own."""
    programs = tmp_path_factory.mktemp("bin")
    for name in ("bash", "basename", "date", "dirname", "env", "mkdir", "rm", "sed", "cat"):
        if path := shutil.which(name):
            (programs / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CHECK", "no")


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "#SBATCH" in s.read_text()], ids=lambda path: path.name)
def test_sbatch_lines_stand_unbroken_at_the_top(script: Path) -> None:
    """SLURM stops reading at the first command, pyxis at the first other line."""
    lines = script.read_text().splitlines()
    block = [at for at, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert block == list(range(1, 1 + len(block)))


def test_dry_run_shows_both_commands(site: Site) -> None:
    site.write()
    done = run_on_login_node(site, "moe7b.sh", "--dry-run", "--nodes=8", "connection=residual", "run_dir=/tmp/x y")
    assert done.returncode == 0, done.stderr
    sbatch, srun = done.stdout.splitlines()[:2]
    assert sbatch.startswith("sbatch '--job-name=x y' "), "singleton goes by it"
    assert sbatch.rstrip().endswith(
        "--nodes=8 " + f"{REPOSITORY}/launch/moe7b.sh connection=residual 'run_dir=/tmp/x y'"
    )
    assert "--container" not in srun
    assert "train configs/olmoe_7b.yaml on_damage=previous keep_last=3 " in srun
    assert srun.rstrip().endswith("connection=residual 'run_dir=/tmp/x y'")


@pytest.mark.parametrize(("mounts", "files"), [("", True), ("/data:/data:ro,/x:/x", True), ("/data:/x", False)])
def test_with_an_image_another_python_checks(
    site: Site, mounts: str, files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`echo` is that Python. Where mounts give folders other names, data cannot be looked for."""
    monkeypatch.delenv("CHECK")
    site.write(more=f"IMAGE=/images/fc.sqsh MOUNTS={mounts} PYTHON=/opt/python CHECK_PYTHON=/bin/echo\n")
    done = run_on_login_node(site, "moe7b.sh", "--dry-run", "--nodes=4")
    _, srun, *_, checked = done.stdout.splitlines()
    assert ("--container-mounts" in srun) == bool(mounts)
    assert checked.startswith("-m megatron_fc topology configs/olmoe_7b.yaml ")
    assert checked.endswith(" --nodes 4 --gpus-per-node 8" + " --check-files" * files)
    assert ("MOUNTS gives folders other names" in done.stderr) != files


def test_container_flags_go_to_srun(site: Site) -> None:
    site.write(more="IMAGE=/images/fc.sqsh MOUNTS=/data:/data,/repo:/repo\n")
    srun = run_on_login_node(site, "moe7b.sh", "--dry-run").stdout.splitlines()[1]
    flags = "--container-image=/images/fc.sqsh --container-mounts=/data:/data,/repo:/repo --container-workdir="
    assert f"{flags}{REPOSITORY} bash -c" in srun


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("residual", "connection=residual"),
        ("sfc_x4", "connection=sfc rate=4"),
        ("dfc_x2", "connection=dfc rate=2"),
        ("dfc_x4", "connection=dfc rate=4"),
        ("no_norm", "connection=dfc rate=2 norm=none"),
        ("no_tanh", "connection=dfc rate=2 tanh=false"),
        ("no_scale", "connection=dfc rate=2 scale=false"),
    ],
)
def test_variants_are_overrides_and_runs_of_their_own(site: Site, variant: str, overrides: str) -> None:
    site.write()
    sbatch, srun = run_on_login_node(site, f"moe1b3.sh {variant}", "--dry-run").stdout.splitlines()[:2]
    assert f"launch/moe1b3.sh {variant} run_dir={site.run_dir(f'moe1b3-{variant}')}" in sbatch
    assert f" keep_last=3 {overrides} num_layers=2 " in srun


CKPT_STEP = "would hold for every start: write 12 into run_dir's checkpoints/latest_checkpointed_iteration.txt instead"
IN_A_JOB = "nothing is submitted inside a job: give options to sbatch, before the script, and --dry-run outside"


@pytest.mark.parametrize(
    ("words", "more", "sentence"),
    [
        ([], "SBATCH_ACCOUNT=CHANGE_ME\n", "SBATCH_ACCOUNT is not set: set it in {site} (empty: the site's default)"),
        (["--output=/dev/null/logs/%j"], "", "the log folder /dev/null/logs cannot be written: give --output=FILE"),
        (["run_dir=/dev/null/run"], "", "run_dir=/dev/null/run cannot be written: choose another"),
        (["--nodes", "4"], "", "'4' is neither an option of sbatch (--nodes=8) nor an override (key=value)"),
        (["-N4"], "", "-N4: write sbatch's options as --name=value, e.g. --nodes=8"),
        (["save=/tmp/x"], "", "save=/tmp/x: checkpoints lie in run_dir, drop save"),
        (["checkpoint.save=/x"], "", "checkpoint.save=/x: checkpoints lie in run_dir, drop save"),
        (["checkpoint.ckpt_step=12"], "", f"checkpoint.ckpt_step=12 {CKPT_STEP}"),
        (
            ["--gpus-per-node=h100:4"],
            "",
            "--gpus-per-node=4 and --ntasks-per-node=8 differ: every GPU has a task, give both",
        ),
        (["--dry-run"], "SLURM_JOB_ID=7\n", f"--dry-run: {IN_A_JOB}"),
    ],
)
def test_mistakes_are_one_sentence(site: Site, words: list[str], more: str, sentence: str) -> None:
    site.write(more=more)
    done = run_on_login_node(site, "moe7b.sh", *words)
    assert done.returncode == 2
    assert done.stderr == f"launch: {sentence.format(site=site.folder / 'site.sh')}\n"
    assert done.stdout == ""


def test_a_run_at_its_target_is_not_submitted(site: Site, tmp_path: Path) -> None:
    site.write()
    (tmp_path / "state").write_text("done\n")
    done = run_on_login_node(site, "moe7b.sh", f"logging.run_dir={tmp_path}")
    sentence = f"launch: the target is reached already; to train on, remove {tmp_path}/state\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def test_sbatch_itself_finds_what_it_needs(tmp_path: Path) -> None:
    """`. launch/site.sh && sbatch launch/moe7b.sh`: an empty partition is none, and the logs' folder is there."""
    site = (
        (REPOSITORY / "launch/site.example.sh").read_text().replace("SBATCH_PARTITION=CHANGE_ME", "SBATCH_PARTITION=")
    )
    (tmp_path / "site.sh").write_text(site)
    words = ["bash", "-c", f". {tmp_path}/site.sh && env"]
    done = subprocess.run(words, env=os.environ | {"USER": "me"}, capture_output=True, text=True, check=True)
    assert "SBATCH_ACCOUNT=CHANGE_ME\n" in done.stdout
    assert "SBATCH_PARTITION" not in done.stdout
    assert (REPOSITORY / "logs").is_dir()


def test_other_mistakes(site: Site, tmp_path: Path) -> None:
    site.write()
    done = run_on_login_node(site, "moe1b3.sh dfc_x3", "--dry-run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("launch: 'dfc_x3' is no variant: residual, sfc_x4, ")

    words = [str(REPOSITORY / "launch/moe7b.sh")]
    variables = os.environ | {"SITE": str(tmp_path / "no.sh")}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.stderr == f"launch: {tmp_path}/no.sh is missing: copy launch/site.example.sh to it and fill it in\n"

    variables = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.stderr == f"launch: submit from the repository's folder, not from {tmp_path}\n"


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (
            ["--nodes=3", "pipeline_model_parallel_size=2"],
            "expert_model_parallel_size=8 does not fit 3 nodes of 8 GPUs: ",
        ),
        (["--nodes=4", "train_data_path=[/no/data]"], "train_data_path=/no/data: /no/data.bin does not exist"),
    ],
)
def test_layout_and_data_are_checked(
    site: Site, words: list[str], start: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CHECK")
    site.write(full_size=True)
    run_dir = tmp_path / "run"
    done = run_on_login_node(site, "moe7b.sh", *words, f"run_dir={run_dir}", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron-fc: {start}")
    assert done.stderr.count("\n") == 1
    assert not run_dir.exists()
