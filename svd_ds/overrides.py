"""Overrides on a command line, KEY=VALUE: quoted for Hydra, or refused in one sentence.

Hydra's grammar reads values as numbers, lists, dicts, and texts of only a few characters. Here a path or name
is taken as it is written: `data.path=~/clips, v1/epoch=3` needs no quotes beyond the shell's. For a key of
DeepSpeed or of another trainer the error message names our key.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from svd_ds.credentials import redact
from svd_ds.settings import TYPE_NAMES, Setting, Text

WORD = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
DEEPSPEED_FILE = "there is no DeepSpeed file, its settings are the keys of parallel, batch and optim"
ZERO_STAGE = (
    "the stage is always 3, because the float32 states of 1.5 billion parameters do not fit a GPU otherwise "
    "(CONTRIBUTING.md); sizes are parallel.reduce_bucket and the other keys of parallel"
)
ACCUMULATION = (
    "it follows from batch.size (clips per step over all ranks) and batch.micro (clips per rank at once)"
)
GLOBAL_BATCH = "use batch.size, clips per step over all ranks"
MICRO_BATCH = "use batch.micro, clips per rank at once"
FOREIGN_KEYS = {
    "deepspeed": DEEPSPEED_FILE,
    "deepspeed_config": DEEPSPEED_FILE,
    "zero_optimization": ZERO_STAGE,
    "zero_stage": ZERO_STAGE,
    "stage": ZERO_STAGE,
    "gradient_accumulation_steps": ACCUMULATION,
    "accumulate_grad_batches": ACCUMULATION,
    "train_batch_size": GLOBAL_BATCH,
    "global_batch_size": GLOBAL_BATCH,
    "batch_size": f"{GLOBAL_BATCH}, or batch.micro, clips per rank at once",
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "micro_batch_size": MICRO_BATCH,
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_clipping": "use optim.gradient_clip",
    "max_grad_norm": "use optim.gradient_clip",
    "fp16": "use precision=bf16 or precision=fp32, because fp16 needs loss scaling, which is not supported",
    "bf16": "use precision=bf16",
    "amp": "use precision=bf16",
    "mixed_precision": "use precision=bf16",
    "offload_optimizer": "use parallel.offload_optimizer=true",
    "offload_param": (
        "parameters stay on the GPUs, where ZeRO-3 shards them; parallel.offload_optimizer=true moves the "
        "optimizer state to host memory"
    ),
    "overlap_comm": "use parallel.overlap_comm",
    "reduce_bucket_size": "use parallel.reduce_bucket",
    "allgather_bucket_size": "use parallel.prefetch_bucket",
    "stage3_prefetch_bucket_size": "use parallel.prefetch_bucket",
    "stage3_param_persistence_threshold": "use parallel.persistence_threshold",
    "stage3_max_live_parameters": "use parallel.max_live",
    "stage3_max_reuse_distance": "use parallel.max_reuse_distance",
    "communication_data_type": "use parallel.reduce_dtype",
    "activation_checkpointing": "use recompute=blocks, attention, full or none",
    "gradient_checkpointing": "use recompute=blocks, attention, full or none",
    "scheduler": "use optim.schedule and optim.warmup_samples",
    "warmup_num_steps": "use optim.warmup_samples, which counts clips",
    "warmup_steps": "use optim.warmup_samples, which counts clips",
    "lr_warmup_steps": "use optim.warmup_samples, which counts clips",
    "learning_rate": "use optim.lr",
    "max_steps": "use run.steps",
    "max_train_steps": "use run.steps",
    "output_dir": "use run.dir",
    "resume_from_checkpoint": "use run.resume=auto, never or a checkpoint's folder",
    "checkpointing_steps": "use checkpoint.every",
    "pretrained_model_name_or_path": "use init.from for the UNet and frozen.path for the other networks",
    "dataloader_num_workers": "use data.num_workers",
    "steps_per_print": "use logger.every",
}
"""Key of DeepSpeed or of another trainer -> our key for it, or why there is none."""
LIST_NAMES = {int: "whole numbers", float: "numbers", bool: "true and false"}
RANK_OPTIONS = ("local_rank", "local-rank")


def quote_for_hydra(
    words: Sequence[str],
    settings: Mapping[str, Setting],
    groups: Callable[[], Collection[str]],
    multirun: bool = False,
) -> list[str]:
    """Quote the words of a command line for Hydra.

    Args:
        settings: full key -> setting.
        groups: returns the names of Hydra's config groups.
        multirun: True if commas separate the values of several runs.

    Raises:
        ValueError: a key does not exist, or a value cannot be read; the message says what to write.
    """
    return [_quote_word(word, settings, groups, multirun) for word in words]


def _quote_word(
    word: str, settings: Mapping[str, Setting], groups: Callable[[], Collection[str]], multirun: bool
) -> str:
    if word.startswith("--"):
        _check_option(word)
        return word
    match = WORD.fullmatch(word)
    if match is None:
        return word
    plus, key, value = match.groups()
    setting = settings.get(key)
    if setting is None:
        _check_key(key, settings, groups)
    elif setting.is_text:
        return f"{plus}{key}={_quote_text(setting, value, multirun)}"
    elif setting.is_list and setting.kind is str and (items := _quote_list_of_texts(value)) is not None:
        return f"{plus}{key}=[{','.join(items)}]"
    if setting is not None and _parse(word) is None:
        raise ValueError(_unreadable(setting, value))
    return word


def _quote_text(setting: Setting, value: str, multirun: bool) -> str:
    """Quote the value of a text setting if Hydra would read it as something else."""
    override = _parse(f"{setting.key}={value}")
    if override is None:
        if value.startswith(("'", '"')):
            quoted = shlex.quote(f'{setting.key}="VALUE"')
            raise ValueError(f"{setting.key} is {value}: the quotes do not match; in a shell write {quoted}")
        if multirun:
            return ",".join(_quoted(part.strip()) for part in value.split(","))
        return _quoted(value)
    read = override.value()
    if isinstance(read, ChoiceSweep) and read.simple_form:
        # Another text with a comma is more likely a forgotten --multirun: Hydra's error says so.
        is_path = isinstance(setting.rule, Text) and setting.rule.is_path
        return value if multirun or not is_path else _quoted(value)
    # Hydra drops the blanks around a value.
    is_other = isinstance(read, bool | int | float | list | dict) or value != value.strip()
    return _quoted(value) if is_other else value


def _quote_list_of_texts(value: str) -> list[str] | None:
    """Quote each text of a list [a,b]; return None if Hydra can read the list without quotes."""
    inner = value.strip()
    if _parse(f"key={value}") is not None or not (inner.startswith("[") and inner.endswith("]")):
        return None
    items = [item.strip() for item in inner[1:-1].split(",")]
    is_quoted = [item[:1] in ("'", '"') and item[-1:] == item[:1] and len(item) > 1 for item in items]
    return [item if quoted else _quoted(item) for item, quoted in zip(items, is_quoted, strict=True)]


def _quoted(value: str) -> str:
    return str(QuotedString(value, Quote.double).with_quotes())


def _parse(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _unreadable(setting: Setting, value: str) -> str:
    problem = f"{setting.key} is {value}: it cannot be read as "
    if setting.is_dict:
        return (
            f"{problem}{{NAME:NUMBER,...}}; on a command line a name has letters, digits, blanks and /-.+:@ "
            "alone: link a folder under such a name"
        )
    if setting.is_list and setting.kind is str:
        return f"{problem}a list; in a shell write " + shlex.quote(f'{setting.key}=["VALUE","VALUE"]')
    kind = f"a list of {LIST_NAMES[setting.kind]}" if setting.is_list else TYPE_NAMES[setting.kind]
    return problem + kind


def _check_option(word: str) -> None:
    name = word.lstrip("-").partition("=")[0]
    if name in RANK_OPTIONS:
        raise ValueError(
            f"there is no option {word}, which DeepSpeed's launcher adds: start the ranks with torchrun, "
            "srun or tools/launch.py, which set it as a variable"
        )
    if name in FOREIGN_KEYS:
        raise ValueError(f"there is no option --{name}: {FOREIGN_KEYS[name]}")


def _check_key(key: str, settings: Mapping[str, Setting], groups: Callable[[], Collection[str]]) -> None:
    """Check that a key exists.

    Raises:
        ValueError: it does not; the message names the key that is probably meant.
    """
    parts = key.split(".")
    parents = [".".join(parts[:count]) for count in range(1, len(parts))]
    if parts[0] == "hydra" or any(p in settings and settings[p].is_dict for p in parents) or key in groups():
        return
    if known := next((parent for parent in parents if parent in settings), None):
        kind = TYPE_NAMES[settings[known].kind]
        raise ValueError(f"there is no key {key}: {known} is {kind}, write {known}=VALUE")
    section = {name for name in settings if name.startswith(f"{parts[0]}.")}
    if key == parts[0] and section:
        return  # a whole section, which is checked with its values
    if foreign := next((part for part in reversed(parts) if part in FOREIGN_KEYS), None):
        raise ValueError(f"there is no key {key}: {FOREIGN_KEYS[foreign]}")
    same_end = [name for name in settings if name.rpartition(".")[2] == parts[-1]]
    near = same_end or difflib.get_close_matches(key, section or settings, n=1)
    if near:
        raise ValueError(f"there is no key {key}: do you mean {' or '.join(near[:3])}?")
    have = sorted(section) or sorted({name.partition(".")[0] for name in settings})
    raise ValueError(f"there is no key {key}; there are {', '.join(have)}")


def swept_values(words: Sequence[str], choices: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """Return key -> one override per value, for each key that a multirun sweeps.

    Args:
        words: from `quote_for_hydra`.
        choices: returns the configs of a group.
    """
    found = {}
    for word in words:
        override = _parse(word) if not word.startswith("-") else None
        if override is None or not override.is_sweep_override():
            continue
        value, name = override.value(), word.partition("=")[0]
        key = name.lstrip("+")
        if isinstance(value, Glob):
            values = value.filter(choices(key))
        elif override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
        else:
            continue
        found[key] = [f"{name}={each}" for each in values]
    return found


def folder_name(words: Sequence[str]) -> str:
    """Turn overrides into part of a folder's name: optim.lr=0.001 -> optim.lr_0.001."""
    return "-".join(map(_folder_part, words))


def _folder_part(word: str) -> str:
    key, _, value = redact(word).lstrip("+").partition("=")
    value = value.strip("'\"")
    plain = re.sub(r"[^\w.+-]+", "_", value, flags=re.ASCII)[-40:]
    if plain != value:
        # Two values must not have the same name.
        plain += f"_{hashlib.sha256(value.encode()).hexdigest()[:6]}"
    return f"{key}_{plain}"
