"""Overrides on a command line: taken exactly as written, or refused in one sentence with their key."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from svd_ds.compose import (
    COMPOSE_ERRORS,
    compose,
    explain,
    keys_for_folder,
    parse_command_line,
    settings_by_key,
)
from svd_ds.config import RunConfig
from svd_ds.overrides import FOREIGN_KEYS, folder_name, quote_for_hydra, swept_values

ROOT = Path(__file__).resolve().parents[2]
EXACT = [
    "a b", " a", "a ", "a=b", "--a=b", "a,b", ", a", "50%", "100%j %% %", "$HOME", "$", "`x`", "it's",
    'say "x"', "a'b", "a[1]", "[a]", "[",
    "{a}", "{a:1}", "}", "(x)", "f(x)", "ü 视频 é", "-x", "-1", "x/", "/", "//x//",
    "a:b", "#1", "a #b", "a\\b", "a\\", "1e5", "1_0", "012", "true", "none", "*", "?", "a;b", "a|b", "a&b",
    "<x>", "!x", "@x", "^", "..", ".", "nan", "inf", "...", "x" * 300,
]  # fmt: skip
PATHS = ["run.dir", "data.path", "frozen.path", "init.from", "evaluation.path", "data.cache", "run.resume"]
REFUSED = [
    "'half", '"half', '"a" b', "range(1,3)", "choice(a,b)", "glob(*)", "???", "? x", "a\tb", "a\nb",
    "\x1b[0m", "${x",
    "a${", "${nothing}", "", " ",
]  # fmt: skip


def value_of(config: RunConfig, key: str) -> object:
    section, _, name = key.rpartition(".")
    tree = config.as_dict()
    return tree[section][name] if section else tree[name]


def outcome(key: str, value: str) -> tuple[object, str]:
    """The value in the config, and "", or None and the sentence that refuses it."""
    try:
        return value_of(compose([f"{key}={value}"]), key), ""
    except COMPOSE_ERRORS as error:
        return None, explain(error)
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("value", EXACT)
def test_path_is_taken_as_it_is_written(value: str) -> None:
    config = compose([f"{key}={value}" for key in PATHS])
    assert [value_of(config, key) for key in PATHS] == [value] * len(PATHS)


@pytest.mark.parametrize(
    "value", ["a b", " a", "50%", "$HOME", "it's", "[a]", "ü", "-1", "a\\", "true", "~/x"]
)
def test_name_is_taken_as_it_is_written(value: str) -> None:
    assert outcome("name", value) == (value, "")


def test_name_with_a_comma_is_taken_for_a_forgotten_m() -> None:
    taken, message = outcome("name", "a,b")
    assert taken is None and message.startswith(
        "Ambiguous value for argument 'name=a,b': one run takes one value"
    )


@pytest.mark.parametrize("key", ["run.dir", "data.path", "init.from"])
def test_hydra_quotes_are_removed_and_home_is_expanded(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert outcome(key, "'a, b'") == ("a, b", "")
    assert outcome(key, r'"say \"x\", ok"') == ('say "x", ok', "")
    assert outcome(key, "~/a b,c") == outcome(key, '"~/a b,c"') == ("/home/someone/a b,c", "")


@pytest.mark.parametrize("value", REFUSED, ids=repr)
@pytest.mark.parametrize("key", ["data.path", "name"])
def test_unreadable_value_is_refused_with_its_key(key: str, value: str) -> None:
    taken, message = outcome(key, value)
    assert taken is None and "\n" not in message
    assert key in message, message


@pytest.mark.parametrize("value", ["[1", "{a", "'1", "1 '", "1=2", "{a:1"])
def test_text_that_cannot_be_read_is_refused_by_every_other_setting(value: str) -> None:
    settings = settings_by_key()
    others = [key for key, setting in settings.items() if not setting.is_text]
    assert len(others) > 80
    for key in others:
        with pytest.raises(
            ValueError, match=f"^{re.escape(f'{key} is {value}')}: it cannot be read as"
        ) as caught:
            quote_for_hydra([f"{key}={value}"], settings, list)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("data.where=[motion>=q25,text_area<=0.07]", ("motion>=q25", "text_area<=0.07")),
        ("data.where=['motion>=q25', \"text_area<=0.07\"]", ("motion>=q25", "text_area<=0.07")),
        ("data.where=[]", ()),
    ],
)
def test_list_of_texts_is_taken_as_written(word: str, values: tuple[str, ...]) -> None:
    assert compose([word]).data.where == values


@pytest.mark.parametrize("foreign", FOREIGN_KEYS)
def test_keys_of_other_trainers_get_advice(foreign: str) -> None:
    advice = FOREIGN_KEYS[foreign]
    for word in (
        f"{foreign}=1",
        f"+{foreign}=1",
        f"deepspeed.{foreign}=1",
        f"++train.{foreign}.x=1",
        f"--{foreign}=1",
    ):
        with pytest.raises(ValueError, match=re.escape(advice)) as caught:
            parse_command_line([word])
        assert foreign in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("parallel.stage=2", "the stage is always 3, because the float32 states of 1.5 billion parameters"),
        ("parallel.zero_stage=2", "the stage is always 3, because the float32 states"),
        ("zero_optimization.stage=1", "the stage is always 3, because the float32 states"),
        ("+zero_optimization={stage:2}", "the stage is always 3, because the float32 states"),
        ("parallel.offload_param=true", "parallel.offload_optimizer=true moves the optimizer state to"),
        (
            "zero_optimization.offload_param.device=cpu",
            "parameters stay on the GPUs, where ZeRO-3 shards them",
        ),
        ("zero_optimization.offload_optimizer.device=cpu", "use parallel.offload_optimizer=true"),
        ("train_batch_size=64", "use batch.size, clips per step over all ranks"),
        ("train_micro_batch_size_per_gpu=2", "use batch.micro, clips per rank at once"),
        ("gradient_accumulation_steps=4", "it follows from batch.size (clips per step over all ranks) and"),
        ("fp16.enabled=true", "use precision=bf16 or precision=fp32, because fp16 needs loss scaling"),
        ("bf16.enabled=true", "use precision=bf16"),
        ("gradient_clipping=1.0", "use optim.gradient_clip"),
        ("--deepspeed", "its settings are the keys of parallel, batch and optim"),
        ("--deepspeed_config=ds.json", "its settings are the keys of parallel, batch and optim"),
        ("--local_rank=0", "start the ranks with torchrun, srun or tools/launch.py"),
    ],
)
def test_settings_of_deepspeed_get_advice(word: str, answer: str) -> None:
    with pytest.raises(ValueError, match=r"^there is no (key|option) ") as caught:
        parse_command_line(["+experiment=stage2", word])
    assert answer in str(caught.value) and "\n" not in str(caught.value)


def test_advice_names_keys_that_exist() -> None:
    words = {word.strip(",.:;") for advice in FOREIGN_KEYS.values() for word in advice.split()}
    keys = {word.partition("=")[0] for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+(=\S*)?", word)}
    assert len(keys) > 15
    assert keys <= set(settings_by_key())


# --- several runs


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["data.path=a b,c d"], ["a b", "c d"]),
        (["data.path='a,b',c"], ["a,b", "c"]),
        (["name=50%, ü"], ["50%", "ü"]),
        (["+experiment=noise_schedule,ablation"], ["noise_schedule", "ablation"]),
        (["optim.lr=1e-3,1e-4"], ["0.001", "0.0001"]),
        (["run.seed=range(1,3)"], ["1", "2"]),
        (["noise=glob(simple*)"], ["simple_interpolated", "simple_shifted"]),
    ],
)
def test_commas_separate_the_values_of_several_runs(words: list[str], values: list[str]) -> None:
    line = parse_command_line(["-m", *words])
    ((key, found),) = swept_values(line.overrides, line.choices).items()
    assert key == words[0].lstrip("+").partition("=")[0]
    read = [OverridesParser.create().parse_override(word).value() for word in found]
    assert [str(value.text if hasattr(value, "text") else value) for value in read] == values


@pytest.mark.parametrize(
    ("words", "unnamed"),
    [
        (["+experiment=noise_schedule", "noise=edm,cosine"], []),
        (["+experiment=noise_schedule", "noise=edm,cosine", "run.seed=1,2"], ["run.seed"]),
        (["+experiment=noise_schedule,ablation", "data.path=x"], []),
        (["data.path=a b,c d"], ["data.path"]),
        (["name=a,b"], []),
        (["run.dir=x/${name}-${run.seed}", "run.seed=1,2", "optim.lr=1e-3,1e-4"], ["optim.lr"]),
        (["run.dir='runs/${now:%H}'", "run.seed=1,2"], ["run.seed"]),
    ],
)
def test_runs_of_a_multirun_differ_in_their_folders(words: list[str], unnamed: list[str]) -> None:
    assert keys_for_folder(parse_command_line(["-m", *words])) == unnamed


def test_different_values_give_different_folders() -> None:
    values = [*EXACT, "a_b", "A b", "a b_", "x" * 299, "ü", "u"]
    names = [folder_name([f"data.path={value}"]) for value in values]
    assert len({*names}) == len({*values})
    assert all(re.fullmatch(r"[\w.+-]{1,200}", name, re.ASCII) for name in names), names


# --- through the launchers


def test_launcher_passes_arguments_unchanged(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    words = [f"data.path={value}" for value in EXACT] + ["--config-dir", "a b", "-m"]
    command = [
        sys.executable,
        str(ROOT / "tools/launch.py"),
        "-n",
        "1",
        "--script",
        str(script),
        "--",
        *words,
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == words


@pytest.mark.parametrize(
    "value", ["a b", "a=b", "a,b", "100%j", "$HOME", "it's", "[a]", "ü 视频", "-x", "x/", "a\\b"]
)
def test_job_and_ranks_find_the_same_run_folder(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("job", ROOT / "tools" / "job.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.chdir(tmp_path)
    words = [f"run.dir={value}"]
    options = ["--job", "7", "--nodes", "n", "--", "debug=tiny", *words]
    monkeypatch.setattr(sys, "argv", ["job.py", *options])
    arguments = tool.parse_arguments().arguments
    assert arguments[1:] == words, "srun starts a program with these, without a shell"
    folder = tool.read_config(arguments, tool.JobClock("7", arguments)).run.dir
    assert str(Path(folder)) == str(Path(value))


def test_agent_of_a_sweep_passes_values_unchanged() -> None:
    """tools/sweep.py starts its trials with these words, without a shell."""
    for value in (*EXACT, 1e-5, True, 3, [1, 2]):
        command = {"args": {"data.path": {"value": value}}}
        assert create_sweep_command_args(command)["args_no_hyphens"] == [f"data.path={value}"]
