"""The shell scripts parse, and the experiments that job scripts name exist."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from svd_ds.command_line import CONF
from svd_ds.compose import compose

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr


CHECKED = "tools/check_nodes.py --job 1 --nodes node1,node2 --cpus 1 --gpus 0"


def shell(commands: str, *arguments: str, **variables: str) -> str:
    """Run commands in bash with stubs of Slurm's commands and of Python; return what it prints."""
    stubs = """
        scontrol() {
          case "$1 $2" in
            "show hostnames") echo node1; echo node2 ;;
            "show job") echo "JobId=$4 JobState=${STATE:-RUNNING}" ;;
            *) echo "scontrol $*" ;;
          esac
        }
        srun() { shift 2; echo "$*"; return ${CODE:-0}; }
        export SLURM_JOB_NODELIST=node[1-2] SVD_DS_PYTHON=${SVD_DS_PYTHON:-echo}
    """
    ended = subprocess.run(
        ["bash", "-c", f"{stubs}\n{commands}", "bash", *arguments],
        cwd=ROOT,
        env={**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.strip()


def started_commands(script: str, *arguments: str, **variables: str) -> str:
    """Return the commands that slurm/SCRIPT would start."""
    return shell(f'. slurm/{script} "$@"', *arguments, **variables)


def training_arguments(script: str, *arguments: str) -> str:
    """Return the arguments of the trainer that slurm/SCRIPT would start."""
    job, _, words = started_commands(script, *arguments).partition(" -- ")
    assert job == "tools/job.py --job 1 --nodes node1,node2 --cpus 1 --gpus 0"
    return words


def test_other_scripts_pass_their_arguments() -> None:
    encode = started_commands("encode.sh", "in", "out", "--size", "8x8").splitlines()
    assert encode == [CHECKED, "echo tools/encode.py in out --size 8x8"]
    assert started_commands("curate.sh", "in", "out").endswith("in out --workers 1")
    sweep = started_commands("sweep.sh", "me/svd/abc", "optim.lr=1")
    assert sweep.startswith("tools/sweep.py --job 1 --nodes node1,node2 ")
    assert sweep.endswith(" -- me/svd/abc optim.lr=1")


@pytest.mark.parametrize(
    ("code", "state", "restarts", "again"),
    [
        ("0", "RUNNING", "0", False),
        ("137", "RUNNING", "0", True),
        ("137", "RUNNING", "3", False),
        ("143", "CANCELLED", "0", False),
        ("2", "RUNNING", "0", False),
    ],
)
def test_failed_task_is_restarted_a_few_times(code: str, state: str, restarts: str, again: bool) -> None:
    environment = {"CODE": code, "STATE": state, "SLURM_RESTART_COUNT": restarts}
    output = shell("(. slurm/encode.sh in out); echo $?", **environment).splitlines()
    queued = [f"job 1 is requeued: srun ended with {code}", "scontrol requeue 1"] if again else []
    checked = [CHECKED] if restarts == "0" else []
    assert output == [*checked, "echo tools/encode.py in out", *queued, code]


def test_tasks_do_not_start_on_nodes_that_fail() -> None:
    assert shell("(. slurm/encode.sh in out); echo $?", SVD_DS_PYTHON="false") == "1"


def test_requeued_array_task_has_the_same_part() -> None:
    words = ("a b", "out", "--part", "%a/4")
    for array in ({"SLURM_ARRAY_TASK_COUNT": "4"}, {"SLURM_ARRAY_TASK_COUNT": "1"}):
        output = started_commands("curate.sh", *words, SLURM_ARRAY_TASK_ID="3", **array)
        assert output.endswith("a b out --part 3/4 --workers 1")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        started_commands("curate.sh", "in", "out", SLURM_ARRAY_TASK_ID="3")
    assert "needs --part %a/N" in refused.value.stderr


def test_each_restart_has_its_own_port_below_the_ephemeral_ports() -> None:
    environments = ({"SLURM_RESTART_COUNT": "0"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "99999999"})
    ports = [int(shell(". slurm/lib.sh; echo $MASTER_PORT", **environment)) for environment in environments]
    assert len(set(ports)) == 3
    assert all(15000 <= port < 30000 for port in ports)


def test_site_settings_may_read_unset_variables(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.env").write_text("module() { SITE=$CONDA_SHLVL$1; }\nmodule load cuda\n")
    command = ". slurm/lib.sh; echo $SITE; echo $NOTHING"
    with pytest.raises(subprocess.CalledProcessError) as ended:
        shell(command, SLURM_SUBMIT_DIR=str(tmp_path))
    assert ended.value.stdout == "load\n", "unset variables of our own scripts are still errors"


def test_usr1_requeues_a_job_that_has_not_started() -> None:
    output = shell(". slurm/lib.sh; kill -USR1 $$; run_training x")
    assert output.startswith("scontrol requeue 1\ntools/job.py ")


def test_job_scripts_start_experiments_that_exist() -> None:
    scripts = [path.name for path in SCRIPTS if path.name.startswith("stage")]
    assert scripts == ["stage1.sh", "stage2.sh", "stage3.sh"]
    for script in scripts:
        name = training_arguments(script).removeprefix("+experiment=")
        assert (CONF / "experiment" / f"{name}.yaml").exists(), f"{script}: {name}"
    assert training_arguments("stage2.sh", "debug=tiny", "x=a b") == "+experiment=stage2 debug=tiny x=a b"
    assert training_arguments("stage3.sh", "multiview", "run.steps=2") == "+experiment=multiview run.steps=2"


DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *SCRIPTS, *CONF.rglob("*.yaml")]
JOBS = re.findall(
    r"sbatch (.*)slurm/(stage\d|sweep)\.sh( .*?)?(?:   .*|`.*)?$",
    "\n".join(path.read_text() for path in DOCUMENTS),
    flags=re.M,
)


@pytest.mark.parametrize(("options", "script", "words"), sorted(set(JOBS)))
def test_documented_jobs_have_settings_and_ranks_that_fit(options: str, script: str, words: str) -> None:
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    shape = dict(re.findall(r"--(nodes|ntasks-per-node)=(\d+)", f"{text}\n{options}"))
    if script == "sweep":
        name, *overrides = words.split()
        assert name == "ENTITY/PROJECT/SWEEP"
        overrides.insert(0, "+experiment=noise_schedule")
    else:
        overrides = training_arguments(f"{script}.sh", *words.split()).split()
    settings = compose(overrides)
    for value in (settings.data.path, settings.frozen.path, settings.init.source or ""):
        assert not value.startswith("?"), f"{value} must be given"
    settings.batch.split(int(shape["nodes"]) * int(shape["ntasks-per-node"]))


def test_jobs_are_documented() -> None:
    named = {(script, word) for _, script, words in JOBS for word in words.split()[:1]}
    assert {("stage3", "multiview"), ("stage1", "stage1_time_embed"), ("stage2", "debug=tiny")} <= named


@pytest.mark.parametrize("path", sorted((CONF.parent / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_files_make_runs_that_compose(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of each parameter, as wandb's agent would write it."""
    sweep = yaml.safe_load(path.read_text())
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "IMAGE_MODEL"):
        monkeypatch.setenv(name, f"its-{name.lower()}")
    command = sweep["command"]
    assert command[:4] == ["${env}", "python", "-m", "svd_ds.train"] and command[-1] == "${args_no_hyphens}"
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values") or (parameter["min"], parameter["max"]):
            config = compose([*command[4:-1], f"{name}={value}"])
            assert config.run.dir == "runs/sweeps/its-wandb_sweep_id/its-wandb_run_id"
