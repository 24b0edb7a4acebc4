"""Checks of a checkpoint's files, made before transformers reads them.

A checkpoint is untrusted. Some keys of its JSON make transformers fetch other repositories (kernels, audio tokenizers,
base models), import packages, or open files by a name that the checkpoint chooses. Such files and keys are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from worker.models import SetupFailed

#: Maximum bytes of one JSON file. The largest, the list of tensors, has about one million.
MAX_JSON_BYTES = 16_000_000

CONFIGS = ("config.json", "generation_config.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
#: Files whose presence makes transformers load another repository, or weights other than plain safetensors.
REFUSED_FILES = ("adapter_config.json", "audio_tokenizer_config.json")
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_SHARD_OF_A_CLUSTER = re.compile(r"shard-\d+-model-.*")

#: Keys that are refused at any depth, with or without a leading underscore.
REFUSED_KEYS = frozenset(
    {
        # Fetch kernels, and run them.
        "attn_implementation",
        "attn_implementation_internal",
        "experts_implementation",
        "experts_implementation_internal",
        "kernel_config",
        "use_kernels",
        "allow_all_kernels",
        # Load other checkpoints.
        "audio_tokenizer",
        "base_model_name_or_path",
        "backbone",
        "backbone_config",
        "use_pretrained_backbone",
        "use_timm_backbone",
        "assistant_model",
        # Name other files.
        "transformers_weights",
        "gguf_file",
        "fast_tokenizer_files",
        "extra_files",
        "extra_config_files",
        # Change what other keys mean.
        "attribute_map",
        "sub_configs",
        "sub_configs_defaults",
        # Run other code than the family's.
        "trust_remote_code",
        "code_revision",
        "custom_generate",
        "custom_pipelines",
        "compile_config",
        "cache_implementation",
        "cache_config",
        "fusion_config",
        "distributed_config",
        "device_mesh",
        "tp_plan",
        "pp_plan",
        "tokenizer_object",
    }
)

_FAMILY = r"([Ii]defics|[Ss]mol[Vv][Ll][Mm])\w*"
#: Allowed values of keys that name a class or a type, which transformers would import.
NAMES = {
    # Published configs still have the name of the text model in training, `vllama3`; nothing reads it.
    "model_type": re.compile(rf"{_FAMILY}|mistral|llama|vllama\d*|siglip\w*"),
    "processor_class": re.compile(_FAMILY),
    "image_processor_type": re.compile(_FAMILY),
    "feature_extractor_type": re.compile(_FAMILY),
    "video_processor_type": re.compile(_FAMILY),
    "tokenizer_class": re.compile(r"(Llama|PreTrained|GPT2|CodeLlama)Tokenizer(Fast)?|TokenizersBackend"),
    "dtype": re.compile(r"(torch\.)?(float(16|32|64)|bfloat16|auto)"),
    "torch_dtype": re.compile(r"(torch\.)?(float(16|32|64)|bfloat16|auto)"),
    "quant_method": re.compile(r"bitsandbytes"),
}
#: Keys whose value must be a JSON object: in a list or a string the keys of NAMES would not be found.
_OBJECTS = frozenset({"quantization_config", "text_config", "vision_config", "perceiver_config"})

FindFile = Callable[[str], Path | None]


def inspect(source: str, **pinned: Any) -> dict[str, Any]:
    """Check a checkpoint's files, and return the content of its config.json. Raises SetupFailed if a file is refused,
    OSError if there is no config.json.

    `source`: a folder or a hub id. `pinned`: arguments of transformers' from_pretrained.
    """
    found = _finder(source, pinned)
    contents = {name: content for name in (*CONFIGS, *PROCESSORS, SHARDS) if (content := _content(name, found))}
    _check_files(source, found)
    for name, content in contents.items():
        check(name, content)
    if "config.json" not in contents:
        raise OSError("it has no config.json.")
    return contents["config.json"]


def require_safetensors(source: str, **pinned: Any) -> None:
    """Raise SetupFailed if a checkpoint has no weights in safetensors. Arguments as for `inspect`.

    Downloads weights that are not in the hub's cache."""
    found = _finder(source, pinned)
    if found(SHARDS) is None and found(WEIGHTS) is None:
        raise SetupFailed(
            f"The checkpoint has neither {WEIGHTS} nor {SHARDS}, and no other form of weights is loaded: set "
            "IDEFICS_MODEL_REVISION to a commit that has one, or save the model again with transformers."
        )


def _finder(source: str, pinned: Mapping[str, Any]) -> FindFile:
    """A function that finds a checkpoint's file by name, downloads it if necessary, and returns None if it has none."""
    named = {name: value for name, value in pinned.items() if name != "trust_remote_code"}

    def found(name: str) -> Path | None:
        path = cached_file(source, name, **named, _raise_exceptions_for_missing_entries=False)
        return Path(path) if path else None

    return found


def _content(name: str, found: FindFile) -> dict[str, Any] | None:
    path = found(name)
    if path is None:
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SetupFailed(f"The checkpoint's {name} has more than {MAX_JSON_BYTES:,} bytes: download it again.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise SetupFailed(f"The checkpoint's {name} is not valid JSON: download it again.") from None
    if not isinstance(content, dict):
        raise SetupFailed(f"The checkpoint's {name} is not a JSON object: download it again.")
    return content


def _check_files(source: str, found: FindFile) -> None:
    for name in REFUSED_FILES:
        if found(name) is not None:
            raise SetupFailed(f"The checkpoint has a file {name}: merge an adapter into its model, or remove the file.")
    folder = Path(source)
    if folder.is_dir() and any(_SHARD_OF_A_CLUSTER.fullmatch(path.name) for path in folder.iterdir()):
        raise SetupFailed("The checkpoint's weights are sharded for a cluster: save it as plain safetensors.")


def check(name: str, content: Mapping[str, Any]) -> None:
    """Raise SetupFailed if the content of the JSON file `name` is refused. Pure."""
    if name == SHARDS:
        _check_weights(content)
        return
    for place, key, value in _entries(content):
        plain = key.lstrip("_")
        if value is None or value is False or place == "model_type":
            # A top-level model_type names the family, which the loader checks.
            continue
        if plain in REFUSED_KEYS:
            raise SetupFailed(f"The checkpoint's {name} has the key {place}, which is refused: remove it.")
        if plain in _OBJECTS and not isinstance(value, dict):
            raise SetupFailed(f"The checkpoint's {name}: {place} is not an object: correct it.")
        if plain == "quantization_config" and "quant_method" not in value:
            raise SetupFailed(
                f"The checkpoint's {name}: {place} has no quant_method: set IDEFICS_QUANTIZATION instead."
            )
        if plain in NAMES and not (isinstance(value, str) and NAMES[plain].fullmatch(value)):
            raise SetupFailed(f"The checkpoint's {name}: {place} has a value that is not supported: correct it.")


def _check_weights(content: Mapping[str, Any]) -> None:
    files = content.get("weight_map")
    names = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
        raise SetupFailed(f"The checkpoint's {SHARDS} names files other than safetensors beside itself: correct it.")


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Each key at any depth as (its path, the key, its value). Without recursion."""
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield place + key, key, inner
                waiting.append((f"{place}{key}.", inner))
        elif isinstance(value, list):
            waiting.extend((f"{place}{number}.", inner) for number, inner in enumerate(value))
