"""What the launch scripts say before anything is submitted; no SLURM is needed for it."""

import os
import re
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
    for name in (
        "bash",
        "basename",
        "date",
        "dirname",
        "env",
        "id",
        "ln",
        "mkdir",
        "mktemp",
        "readlink",
        "rm",
        "rmdir",
        "sed",
        "cat",
    ):
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
    sbatch, srun, log = done.stdout.splitlines()[:3]
    assert sbatch.startswith("SBATCH_PARTITION=batch sbatch '--job-name=x y' "), "singleton goes by it"
    assert re.fullmatch(r"job log    \S+/logs/x y-%j\.log, time limit 24:00:00", log)
    assert sbatch.rstrip().endswith(
        "--nodes=8 " + f"{REPOSITORY}/launch/moe7b.sh connection=residual 'run_dir=/tmp/x y' checked=8x8"
    )
    assert "--container" not in srun
    assert "train configs/olmoe_7b.yaml on_damage=previous keep_last=3 " in srun
    assert srun.rstrip().endswith("connection=residual 'run_dir=/tmp/x y'")


@pytest.mark.parametrize(
    ("image", "mounts", "files"),
    [
        ("/images/fc.sqsh", "", True),
        ("/images/fc.sqsh", "/data:/data:ro,/x:/x", True),
        ("/images/fc.sqsh", "/data:/x", False),
        ("", "", True),
    ],
)
def test_with_an_image_another_python_checks(
    site: Site, image: str, mounts: str, files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`echo` is that Python. Where mounts give folders other names, data cannot be looked for."""
    monkeypatch.delenv("CHECK")
    pythons = "PYTHON=/opt/python CHECK_PYTHON=/bin/echo" if image else "PYTHON=/bin/echo"
    site.write(more=f"IMAGE={image} MOUNTS={mounts} {pythons}\n")
    done = run_on_login_node(site, "moe7b.sh", "--dry-run", "--nodes=4")
    _, srun, *_, checked = done.stdout.splitlines()
    assert ("--container-mounts" in srun) == bool(mounts)
    assert checked.startswith("-m megatron_fc topology configs/olmoe_7b.yaml ")
    # Which packages are there it can say only where it is the one that trains.
    asked = " --check-files" * files + " --check-packages" * (not image)
    assert checked.endswith(" --nodes 4 --gpus-per-node 8" + asked)
    assert ("MOUNTS gives folders other names" in done.stderr) != files


def test_a_dry_run_of_a_suite_records_nothing(site: Site, tmp_path: Path) -> None:
    """`echo` stands for the Python that is asked which runs are left; what it answers becomes the array."""
    site.write(more="IMAGE=/images/fc.sqsh MOUNTS= CHECK_PYTHON=/bin/echo\n")
    folder = tmp_path / "ablated"
    done = run_on_login_node(site, "ablate.sh configs/ablation/paper.yaml", "--dry-run", f"run_dir={folder}")
    assert done.returncode == 0, done.stderr
    asked = re.search(r"'--array=-m megatron_fc ablate \S+ .* --out (\S+) --left (\S+) --dry-run'", done.stdout)
    assert asked is not None
    assert asked[1] == str(folder)
    assert not folder.exists()
    assert not Path(asked[2]).exists()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--nodes", "4"], "--nodes=4"),
        (["-N", "4"], "--nodes=4"),
        (["-N4"], "--nodes=4"),
        (["-N", "4", "--nodes=6"], "--nodes=4 --nodes=6"),
        (["-p", "part", "-t", "10:01"], "--partition=part --time=10:01"),
        (["--exclusive", "lr=1", "--exclusive=user", "-H"], "--exclusive --exclusive=user --hold"),
        (["--export", "ALL,LR=1", "--comment=lr=1"], "--export=ALL,LR=1 --comment=lr=1"),
    ],
)
def test_options_are_told_from_overrides(
    site: Site, words: list[str], options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the check, for which `echo` stands."""
    monkeypatch.delenv("CHECK")
    site.write(more="IMAGE=/images/fc.sqsh MOUNTS= CHECK_PYTHON=/bin/echo\n")
    done = run_on_login_node(site, "moe7b.sh", "--dry-run", *words, "seed=2")
    assert done.returncode == 0, done.stderr
    sbatch, _, *_, checked = done.stdout.splitlines()
    overrides = "lr=1 seed=2" if "lr=1" in words else "seed=2"
    behind_log = sbatch.partition("%x-%j.log ")[2]
    assert behind_log.startswith(f"{options} {REPOSITORY}/launch/moe7b.sh {overrides} run_dir=")
    nodes = next((option[8:] for option in reversed(options.split()) if option.startswith("--nodes=")), "8")
    assert f" --nodes {nodes} " in checked


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch not found: apt-get install slurm-client")
def test_sbatch_agrees_on_which_options_take_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an option that takes one, --version is its value; else sbatch prints it."""
    monkeypatch.undo()
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}

    def sbatch(*words: str) -> str:
        stdin = subprocess.DEVNULL
        return subprocess.run(["sbatch", *words], env=environment, stdin=stdin, capture_output=True, text=True).stdout

    listed = re.findall(r"^ +(?:-(\w),? +)?--([a-z][-a-z]+)", sbatch("--help"), re.MULTILINE)
    assert len(listed) > 80
    names = {f"--{name}": name for _, name in listed} | {f"-{letter}": name for letter, name in listed if letter}
    # The first three end the program; with the last one it needs no script, and would submit.
    options = [option for option in names if names[option] not in ("help", "usage", "version", "wrap")]
    script = """fail() { exit 1; }; . launch/words.sh
    for option; do (read_words $option x && echo $OPTIONS) || (read_words $option && echo $OPTIONS); done"""
    words = ["bash", "-c", script, "_", *options]
    ours = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    theirs = [
        f"--{names[option]}" + ("" if sbatch(option, "--version").startswith("slurm") else "=x") for option in options
    ]
    assert ours == theirs


def test_without_a_site_file_a_dry_run_shows_placeholders(tmp_path: Path) -> None:
    missing = tmp_path / "site.sh"
    variables = {"SITE": str(missing), "USER": "me"}
    for words in (
        ["moe7b.sh", "--dry-run", "-N", "8"],
        ["moe7b.sh", "connection=dhc", "--dry-run"],
        ["dense1b.sh", "--dry-run"],
        ["moe1b3.sh", "dfc_x4", "--dry-run"],
        ["profile.sh", "configs/olmoe_7b.yaml", "--dry-run"],
        ["evaluate.sh", "configs/olmoe_7b.yaml", "of=/runs/moe7b", "tasks=configs/eval/olmoe.yaml", "--dry-run"],
        ["chain.sh", "1", "launch/moe7b.sh", "--dry-run"],
        ["mpi.sh", "mpirun", "-n", "2", "--", "configs/olmoe_7b.yaml", "--dry-run"],
    ):
        command = [str(REPOSITORY / "launch" / words[0]), *words[1:]]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"note: {missing} is missing, so placeholders are shown, and data are not looked")
        assert "copy launch/site.example.sh to it and fill in SBATCH_ACCOUNT, " in done.stderr
        assert done.stderr.count("\n") == 1
        lines = done.stdout.splitlines()
        start = next(line for line in reversed(lines) if not line.startswith("job log "))
        if words[0] != "mpi.sh":
            assert lines[-1].startswith("job log    logs/")
            assert lines[0].startswith("SBATCH_ACCOUNT=CHANGE_ME SBATCH_PARTITION=CHANGE_ME sbatch --job-name=")
        assert "'train_data_path=[/scratch/data/dolma/train]'" in start
        assert "run_dir=/scratch/me/runs/" in start
    assert list(tmp_path.iterdir()) == []


def test_help_is_the_script_own_description(site: Site) -> None:
    done = run_on_login_node(site, "moe7b.sh", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OLMoE-7B with Frac-Connections (DFCx4) on 3T tokens.")
    assert done.stdout.endswith("docs/launch.md has the rest.\n")


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


@pytest.mark.parametrize(
    ("script", "words", "name"),
    [
        ("moe7b.sh", "connection=dfc rate=4", "moe7b"),
        ("moe7b.sh", "connection=residual rate=2", "moe7b-residual"),
        ("moe7b.sh", "connections.connection=dhc", "moe7b-dhc"),
        ("dense1b.sh", "rate=2", "dense1b-dfc_x2"),
        ("moe1b3.sh dfc_x2", "rate=2", "moe1b3-dfc_x2"),
        ("moe1b3.sh residual", "connection=residual", "moe1b3-residual"),
        ("moe1b3.sh dfc_x4", "connection=mhc", "moe1b3-dfc_x4-mhc"),
        ("profile.sh configs/olmoe_7b.yaml", "connection=dhc rate=2", "profile-olmoe_7b-dhc_x2"),
        (
            "evaluate.sh configs/olmoe_7b.yaml of=/runs/moe7b-residual sets=x",
            "connection=residual",
            "evaluate-moe7b-residual",
        ),
    ],
)
def test_runs_of_two_connections_share_no_folder(site: Site, script: str, words: str, name: str) -> None:
    site.write()
    done = run_on_login_node(site, script, "--dry-run", *words.split())
    assert f" run_dir={site.run_dir(name)} checked=" in done.stdout, done.stderr


CKPT_STEP = "would hold for every start: write 12 into run_dir's checkpoints/latest_checkpointed_iteration.txt instead"
GEOMETRY = "the layout depends on the number of tasks and GPUs: give --nodes, --ntasks-per-node and --gpus-per-node"
SHORT = (
    "--time={} is not longer than the 600 s of --signal=B:USR1@600: give more --time, or a smaller "
    "--signal=B:USR1@SECONDS"
)
IN_A_JOB = "nothing is submitted inside a job: give options to sbatch, before the script, and --dry-run outside"


@pytest.mark.parametrize(
    ("words", "more", "sentence"),
    [
        ([], "SBATCH_ACCOUNT=CHANGE_ME\n", "SBATCH_ACCOUNT is not set: set it in {site} (empty: the site's default)"),
        (["--output=/dev/null/logs/%j"], "", "the log folder /dev/null/logs cannot be written: give --output=FILE"),
        (["run_dir=/dev/null/run"], "", "run_dir=/dev/null/run cannot be written: choose another"),
        (["8"], "", "'8' is neither an option of sbatch (--nodes 8) nor an override (key=value)"),
        (["--exclusive", "user"], "", "'user' is neither an option of sbatch (--nodes 8) nor an override (key=value)"),
        (["--nodes"], "", "--nodes has no value: write --nodes=VALUE"),
        (["-t", "--exclusive"], "", "-t has no value: write --time=VALUE"),
        (["--comment", "lr=1"], "", "--comment has no value: write --comment=VALUE"),
        (["-N=4"], "", "-N=4 has no value: write --nodes=VALUE"),
        (["-Hv"], "", "-Hv: --hold takes no value"),
        (["-y"], "", "-y is no option of sbatch"),
        (["-N", "2-4"], "", "--nodes=2-4: give one number, the layout depends on it"),
        (["save=/tmp/x"], "", "save=/tmp/x: checkpoints lie in run_dir, drop save"),
        (["checkpoint.save=/x"], "", "checkpoint.save=/x: checkpoints lie in run_dir, drop save"),
        (["checkpoint.ckpt_step=12"], "", f"checkpoint.ckpt_step=12 {CKPT_STEP}"),
        (
            ["--gpus-per-node=h100:4"],
            "",
            "--gpus-per-node=4 and --ntasks-per-node=8 differ: every GPU has a task, give both",
        ),
        (["--gres=gpu:4"], "", f"--gres=gpu:4: {GEOMETRY}"),
        (["--gres=nvme:1,gpu:h100:8"], "", f"--gres=nvme:1,gpu:h100:8: {GEOMETRY}"),
        (["-n", "16"], "", f"--ntasks=16: {GEOMETRY}"),
        (["--gpus", "16"], "", f"--gpus=16: {GEOMETRY}"),
        (["--gpus-per-task=1"], "", f"--gpus-per-task=1: {GEOMETRY}"),
        (["--ntasks-per-gpu=1"], "", f"--ntasks-per-gpu=1: {GEOMETRY}"),
        (["--ntasks-per-n=4"], "", "--ntasks-per-n=4: write --ntasks-per-node out"),
        (["--node=4"], "", "--node=4: write --nodes out"),
        (["--time=00:05:00"], "", SHORT.format("00:05:00")),
        (["-t", "10"], "", SHORT.format("10")),
        ([], "export SBATCH_TIMELIMIT=0-0:10:0\n", SHORT.format("0-0:10:0")),
        (["--tim=30"], "", "--tim=30: write --time out"),
        (["--lr", "1e-4"], "", "--lr is no option of sbatch; an override is lr=1e-4"),
        (["--train-samples=8"], "", "--train-samples is no option of sbatch; an override is train_samples=8"),
        ([], "export SBATCH_GRES=gpu:4\n", f"SBATCH_GRES=gpu:4: {GEOMETRY}"),
        ([], "export SBATCH_GPUS=16\n", f"SBATCH_GPUS=16: {GEOMETRY}"),
        (
            [],
            "export SBATCH_GPUS_PER_NODE=4\n",
            "--gpus-per-node=4 and --ntasks-per-node=8 differ: every GPU has a task, give both",
        ),
        (
            ["--array=0-3"],
            "",
            "--array=0-3: its jobs would share run_dir: launch/chain.sh N SCRIPT ..., or one command for each run",
        ),
        (["--signal=USR1@600"], "", "--signal=USR1@600: the script listens for B:USR1@SECONDS"),
        (["--signal=B:TERM@600"], "", "--signal=B:TERM@600: the script listens for B:USR1@SECONDS"),
        (
            ["--wait"],
            "",
            "--wait: sbatch would return at the end of the job, which is written down before: leave it out",
        ),
        (["--wrap=x"], "", "--wrap=x: the script is what is submitted: leave it out"),
        (["--dry-run"], "SLURM_JOB_ID=7\n", f"--dry-run: {IN_A_JOB}"),
    ],
)
def test_mistakes_are_one_sentence(site: Site, words: list[str], more: str, sentence: str) -> None:
    site.write(more=more)
    done = run_on_login_node(site, "moe7b.sh", *words)
    assert done.returncode == 2
    assert done.stderr == f"launch: {sentence.format(site=site.folder / 'site.sh')}\n"
    assert done.stdout == ""


def test_a_gres_that_is_no_gpu_and_a_signal_of_another_length_are_the_users(site: Site) -> None:
    site.write()
    words = ["--gres=nvme:1", "--signal=RB:SIGUSR1@1200", "--gpus-per-node=0", "--ntasks-per-node=2"]
    done = run_on_login_node(site, "moe7b.sh", "--dry-run", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "checked=8x2" in done.stdout


def functions(code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code with the scripts' functions, in a run's folder, with the programs of this machine."""
    words = ["bash", "-c", f"source launch/common.sh; RUN_DIR={tmp_path}; WORDS=() OPTIONS=() CHECKED=''; {code}"]
    environment = {"PATH": os.environ["PATH"]} | variables
    return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def all_programs(monkeypatch: pytest.MonkeyPatch, login_node: None) -> None:
    monkeypatch.undo()


JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("checked", "differs", "sentence"),
    [
        ("2x2", {}, ""),
        ("", {}, ""),
        ("2x2", {"SLURM_NTASKS": "1"}, "SLURM gives 1 tasks for 2 nodes x 2 tasks: give --nodes and --ntasks-per-node"),
        ("", {"SLURM_NTASKS": "3"}, "SLURM gives 3 tasks for 2 nodes x 2 tasks: give --nodes and --ntasks-per-node"),
        ("2x2", {"SLURM_NNODES": "1", "SLURM_NTASKS": "2"}, "SLURM gives 1 nodes x 2 tasks, and 2x2 were checked: "),
        ("8x8", {}, "SLURM gives 2 nodes x 2 tasks, and 8x8 were checked: submit again with --nodes=2"),
        ("", {"SLURM_NTASKS_PER_NODE": ""}, "sbatch was given no --ntasks-per-node: give it, and as many"),
    ],
)
def test_a_job_that_is_not_what_was_checked_ends(
    checked: str, differs: dict[str, str], sentence: str, all_programs: None, tmp_path: Path
) -> None:
    done = functions(f"CHECKED={checked}; compare_job", tmp_path, **JOB | differs)
    assert done.returncode == (2 if sentence else 0)
    assert done.stderr.startswith(f"launch: {sentence}" if sentence else "")
    assert done.stderr.count("\n") == bool(sentence)


@pytest.mark.parametrize(
    ("tasks", "gpus", "said"),
    [
        ("2(x4)", "2", "n1\n"),
        ("2", "", "n1\n"),
        ("1(x4)", "2", "launch: n1 has 2 GPUs for tasks: 1(x4); every GPU has a task: give --ntasks-per-node=G "),
        ("2,1", "2", "launch: n1 has 2 GPUs for tasks: 2,1; every GPU has a task: "),
        ("2(x4)", "4", "launch: n1 has 4 GPUs for tasks: 2(x4); every GPU has a task: "),
    ],
)
def test_every_task_compares(tasks: str, gpus: str, said: str, all_programs: None, tmp_path: Path) -> None:
    variables = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": gpus, "SLURMD_NODENAME": "n1"}
    per_node = "1" if tasks == "1(x4)" else "2"
    ids = {"SLURM_LOCALID": "0", "SLURM_PROCID": "0", "TASKS_PER_NODE": per_node}
    done = functions("compare", tmp_path, **variables, **ids)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said)
    quiet = functions("compare", tmp_path, **variables, **ids | {"SLURM_LOCALID": "1", "SLURM_PROCID": "3"})
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("codes", "returns", "decides"),
    [
        ("75", 75, 75),
        ("", 0, 0),
        ("2 75", 137, 2),
        ("75 16", 75, 16),
        ("16 2", 16, 2),
        ("2 16", 16, 2),
        ("17 2", 17, 17),
        ("2 17", 17, 17),
        ("1", 143, 143),
    ],
)
def test_of_all_ranks_codes_the_one_that_decides_is_taken(
    codes: str, returns: int, decides: int, all_programs: None, tmp_path: Path
) -> None:
    srun = f"""srun() {{ for code in {codes}; do
      echo "srun: error: n1: tasks 0-3: Exited with exit code $code" >&2
    done; echo "0: srun: error: Exited with exit code 17" >&2; return {returns}; }}"""
    done = functions(f"{srun}; follow srun; echo $CODE", tmp_path)
    assert done.stdout == f"{decides}\n"
    assert done.stderr.count("\n") == len(codes.split()) + 1, "everything is handed on"


def test_of_an_array_the_element_alone_goes_back(all_programs: None, tmp_path: Path) -> None:
    """The last element has the array's own number (here 11), and scontrol takes that for all of them."""
    stubs = """say() { :; }; attempt() { return 1; }; compare_job() { :; }
    scontrol() { [[ $1 != show ]] || return 0; echo "$@" >"$RUN_DIR/said"; }"""
    array = {"SLURM_JOB_ID": "11", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n0"}
    done = functions(f"{stubs}; job", tmp_path, **array)
    assert (done.returncode, (tmp_path / "said").read_text()) == (0, "requeue 11_2\n"), done.stderr
    del array["SLURM_ARRAY_JOB_ID"], array["SLURM_ARRAY_TASK_ID"]
    functions(f"{stubs}; job", tmp_path, **array)
    assert (tmp_path / "said").read_text() == "requeue 11\n"


def test_of_jobs_that_claim_a_run_at_once_one_gets_it(all_programs: None, tmp_path: Path) -> None:
    """All look before any writes, were there no lock."""
    claims = """squeue() { [[ $3 == [0-9]* ]] && echo "$3"; }; guard() { echo "$JOB goes on"; exit; }; attempt"""
    words = ["bash", "-c", f"source launch/common.sh; RUN_DIR={tmp_path}; {claims}"]
    environment = {"PATH": os.environ["PATH"]}
    jobs = [
        subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env=environment | {"SLURM_JOB_ID": str(job)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in range(1, 13)
    ]
    said = [job.communicate() for job in jobs]
    winner = (tmp_path / "job").read_text().strip()
    assert [out for out, _ in said if out] == [f"{winner} goes on\n"]
    sentence = (
        f"launch: job {winner} has run_dir={tmp_path}: scancel {winner}, wait for it, or choose another run_dir\n"
    )
    assert [err for _, err in said if err] == [sentence] * 11
    assert not (tmp_path / "job.lock").is_symlink()


def test_a_claim_that_was_never_given_back_is_named(all_programs: None, tmp_path: Path) -> None:
    (tmp_path / "job.lock").symlink_to("job 5")
    done = functions("sleep() { :; }; claim me", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"launch: {tmp_path}/job.lock has been held for a minute by job 5: where that has ended, remove it\n"
    )


@pytest.mark.parametrize(
    ("printed", "more", "said", "job"),
    [
        ("17", "", "Submitted batch job 17\n", "17\n"),
        ("17;cluster", "", "Submitted batch job 17\n", "17\n"),
        ("17", "--parsable", "17\n", "17\n"),
        ("17", "--quiet", "Submitted batch job 17\n", "17\n"),
    ],
)
def test_a_job_is_written_down_whatever_sbatch_prints(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, more: str, said: str, job: str
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\n[[ $1 == --parsable ]] || exit 1\necho "sbatch: a warning" >&2\necho "{printed}"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}")
    site.write()
    done = run_on_login_node(site, "moe7b.sh", *more.split(), f"run_dir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "sbatch: a warning\n")
    assert (tmp_path / "run/job").read_text() == job


@pytest.mark.parametrize("why", ["Could not establish a configuration source", "Unknown partition"])
def test_a_refusal_of_sbatch(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """It leaves no folder; in a dry run, that sbatch is installed where no cluster is refuses nothing."""
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\necho 'sbatch: error: one' >&2; echo 'sbatch: {why}' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}")
    site.write()
    done = run_on_login_node(site, "moe7b.sh", f"run_dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (2, f"launch: sbatch refuses: sbatch: {why}\n")
    assert not (tmp_path / "run").exists()
    done = run_on_login_node(site, "moe7b.sh", f"run_dir={tmp_path / 'run'}", "--dry-run")
    if "source" in why:
        said = f"note: sbatch reaches no cluster here, so SLURM is not asked: sbatch: {why}\n"
        assert (done.returncode, done.stderr) == (0, said)
    else:
        assert (done.returncode, done.stderr) == (2, f"launch: sbatch refuses: sbatch: {why}\n")


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
    done = run_on_login_node(site, "moe7b.sh", *words, f"run_dir={run_dir}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron-fc: {start}")
    assert done.stderr.count("\n") == 1
    assert not run_dir.exists()
